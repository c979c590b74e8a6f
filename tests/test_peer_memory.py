"""Setting up shared memory: what one rank cannot do ends every rank, none is left waiting."""

import pytest
import torch

from sglang_macs.comm import peer_memory
from sglang_macs.errors import MacsNotActive
from tests.support.ranks import run_ranks


def _unfit(rank: int, world: int) -> str:
    import torch.distributed as dist

    return peer_memory.unreachable(dist.group.WORLD, "compute capability 8.0" if rank == 1 else "")


def test_a_device_that_one_rank_alone_cannot_use_is_used_by_none():
    assert run_ranks(2, _unfit) == ["compute capability 8.0"] * 2


class _Operators:
    """In place of the CUDA operators; rank 1 fails at `step`."""

    def __init__(self, rank: int, step: str) -> None:
        self.fails = step if rank == 1 else ""

    def allocate_shared(self, size: int):
        if self.fails == "allocate":
            raise RuntimeError("CUDA out of memory\nmore lines")
        return torch.zeros(size, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)

    def open_shared(self, handle):
        if self.fails == "map":
            raise RuntimeError("invalid handle")
        return 1


def _share(rank: int, world: int, step: str) -> str:
    import torch.distributed as dist

    peer_memory.ops = _Operators(rank, step)
    try:
        return str(len(peer_memory.share(8, dist.group.WORLD).addresses))
    except MacsNotActive as error:
        return str(error)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("allocate", "rank 1 cannot allocate shared memory: CUDA out of memory"),
        ("map", "rank 1 cannot map the memory of its peers: invalid handle"),
        ("", "2"),
    ],
)
def test_a_rank_that_fails_alone_ends_all(step, said):
    assert run_ranks(2, _share, step) == [said] * 2

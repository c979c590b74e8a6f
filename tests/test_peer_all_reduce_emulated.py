"""peer_all_reduce on the emulated machine: sums of many epochs over the same regions, ranks that run apart, and a dead
one."""

from __future__ import annotations

import pytest
import torch
from support import emulated
from support import fused_c as fc
from support.emulated import Kernels
from support.peer_reduce_case import ReduceGroup

pytestmark = pytest.mark.emulated
SOURCES = [emulated.CUDA / name for name in ("peer_all_reduce.cu", "peer_capi.cu")]
SOON_NS = 300_000  # of simulated time


def build(*defines: str, races: bool = False) -> Kernels:
    return Kernels(emulated.build("peer_all_reduce", *SOURCES, defines=["MACS_C_API", *defines], races=races))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "watched"])
def kernels(request) -> Kernels:
    return build(races=request.param)


def launch(group: ReduceGroup, ranks) -> None:
    """Those ranks, at the same time."""
    with group.kernels.machine.together():
        for rank in ranks:
            group.kernels.stream = rank + 1
            group.launch(rank)


# Less than a block, and some blocks; with more sources than are in flight.
@pytest.mark.parametrize(("ranks", "size"), [(1, 5), (2, 700), (3, 1), (4, 1030), (10, 300)])
def test_sums_of_many_epochs(kernels: Kernels, ranks: int, size: int) -> None:
    group = ReduceGroup(kernels, ranks, size, "cpu")
    for seed in range(5):
        kernels.machine.configure(seed)
        group.load(seed)
        launch(group, range(ranks))
        for rank in range(ranks):
            assert torch.equal(group.values(rank), group.expected())
            assert group.status(rank).fault == 0
    assert not group.unguarded()


def test_a_thread_adds_more_values_than_one() -> None:
    """As of 128 experts, where all blocks have fewer threads than there are values: here two blocks do."""
    group = ReduceGroup(build("MACS_REDUCE_BLOCKS=2"), 3, 2 * 2 * 256 + 4, "cpu")
    for seed in range(3):
        group.load(seed)
        launch(group, range(3))
        for rank in range(3):
            assert torch.equal(group.values(rank), group.expected())


def test_a_rank_may_be_an_epoch_ahead(kernels: Kernels) -> None:
    """Several epochs of all ranks in flight, each over the sums of the one before: the words of the next epoch do not
    take those of this one away.
    """
    group = ReduceGroup(kernels, 3, 600, "cpu")
    for seed in range(4):
        group.load(seed)
        kernels.machine.configure(seed)
        with kernels.machine.together():
            for rank in range(3):
                kernels.stream = rank + 1
                for _ in range(3):
                    group.launch(rank)
        for rank in range(3):
            assert torch.equal(group.values(rank), group.expected() * 9)


def test_a_rank_that_never_comes_is_named_and_nobody_gets_half_a_sum(kernels: Kernels) -> None:
    group = ReduceGroup(kernels, 3, 600, "cpu", timeout_ns=SOON_NS)
    for seed in range(2):
        group.load(seed)
        launch(group, range(3))
    group.load(9)
    launch(group, [0, 2])
    for rank in (0, 2):
        found = group.status(rank)
        assert (fc.FAULTS[found.fault], found.peer, found.epoch, found.seen) == ("values", 1, 3, 1)
        assert torch.equal(group.values(rank), group.own[rank])
    before = kernels.machine.now_ns
    launch(group, [0, 2])  # with a fault on record nobody waits any more
    assert kernels.machine.now_ns - before < SOON_NS
    assert not group.unguarded()


def test_sizes_that_are_none_are_refused(kernels: Kernels) -> None:
    for wrong in ({"num_ranks": 17}, {"rank": 2}, {"size": 0}):
        params = ReduceGroup(kernels, 2, 4, "cpu").params(0)
        for name, value in wrong.items():
            setattr(params, name, value)
        with pytest.raises(emulated.Failure, match="refused before the launch"):
            kernels("peer_all_reduce", params)

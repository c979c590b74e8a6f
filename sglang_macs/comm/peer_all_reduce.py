"""The exchange of the plan in one kernel, among ranks that address each other's memory, in place of an all-reduce of
NCCL, of which launching alone takes the host as long as three kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..errors import MacsError
from . import peer_status
from .peer_memory import PeerMemory

# Of a wait for a peer, which may compile kernels that this rank does not need (dispatch/fused.py). Where a rank has
# died, SGLang ends the others before.
TIMEOUT_NS = 200 * 10**9


class PeerAllReduce:
    """Sums i32 tensors of one size over the ranks, in place. Collective: every rank calls it, in the same order.

    Args:
        memory: `region_bytes` of every rank, zero-filled.
        size: numbers of a tensor.
        hops: as `ops.peer_all_reduce` has it.
    """

    def __init__(self, memory: PeerMemory, size: int, hops: int = 0) -> None:
        self.memory, self.size, self.hops = memory, size, hops
        self.peers = ops.Peers(memory.own, memory.addresses, memory.rank, TIMEOUT_NS)  # for `ops.plan`
        self._watch = peer_status.Watch()

    @staticmethod
    def region_bytes(num_ranks: int, size: int) -> int:
        """Of a rank's region."""
        return ops.peer_reduce_layout(num_ranks, size).bytes

    def takes(self, values: Tensor) -> bool:
        return values.numel() == self.size and values.dtype == torch.int32 and values.is_cuda

    def __call__(self, values: Tensor) -> None:
        """[size] i32. What never came is left out, and `check` raises."""
        ops.peer_all_reduce(self.peers, values, self.hops)

    def check(self) -> None:
        """Raises MacsError once a wait has given up; never makes the host wait."""
        self._raise_for(self._watch.look(self.memory.own[: peer_status.SIZE]))

    def check_arrived(self) -> None:
        """As `check`, of what was sent for already: behind a pass, whether that pass went well."""
        self._raise_for(self._watch.arrived())

    def _raise_for(self, found: peer_status.Record | None) -> None:
        if found is not None:
            raise MacsError(
                "exchange",
                f"{found.words}, says rank {self.memory.rank} (epoch {found.epoch})",
                f"every rank within {TIMEOUT_NS // 10**9} s",
                "Look at that rank's log, or serve with --macs-all-reduce group.",
            )

"""What ranks share memory for, and whether they may: the fused dispatch, one for each half of a batch, and the plan's
all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .. import ops
from ..comm import peer_memory
from ..comm.peer_all_reduce import PeerAllReduce
from ..config import MacsConfig
from ..console import say
from ..errors import MacsNotActive
from ..ops.definitions import limit
from .fused import FusedDispatch, Sizes, unsupported

COMPUTE_CAPABILITY = 9  # Hopper: what the kernels are built and were measured for


def row_format(impl: Any) -> str | None:
    """Of the rows that DeepEP's implementation `impl` sends, as the runner wants them; None: not one of ours."""
    if any(getattr(impl, name, False) for name in ("use_nvfp4", "use_mxfp4", "use_mxfp8")):
        return None
    return "fp8" if impl.use_fp8 else "bf16"


class Transports:
    """Made by the first MoE layer that asks, and shared by all: their dispatches follow one another."""

    def __init__(self, config: MacsConfig) -> None:
        self.config = config
        self._sizes: Sizes | None = None
        self._made: list[FusedDispatch] = []
        self._sum_size: int | None = None  # once a layer has asked
        self._sum: PeerAllReduce | None = None

    def of(self, sizes: Sizes, halves: int, mode: str, overlaps: bool, group: dist.ProcessGroup) -> list[FusedDispatch]:
        """One for each half, or none: DeepEP carries. Says which, once. Collective at the first call.

        mode: DeepEP's, "auto", "normal" or "low_latency". overlaps: combine begins inside the experts' GEMM.
        group: on the host, in the order of the EP ranks.
        Raises MacsNotActive where --macs-dispatch fused cannot be had.
        """
        if self.config.dispatch == "deepep":
            return []
        if self._sizes is None:
            self._sizes = sizes
            why = self.config.no_low_latency(mode) or ("--enable-single-batch-overlap" if overlaps else "")
            why = why or unsupported(self.config, sizes) or peer_memory.unreachable(group, unfit_device())
            if why and self.config.dispatch == "fused":
                raise MacsNotActive(f"--macs-dispatch fused: {why}; pass --macs-dispatch deepep, or auto")
            if not why:
                self._made = [make(self.config, sizes, group) for _ in range(halves)]
            say_for_group(self._line(why, sizes), group)
        return self._made if sizes == self._sizes else []

    @property
    def fuses(self) -> bool:
        """Whether planned batches go through the fused dispatch."""
        return bool(self._made)

    def all_reduce(self, size: int, group: dist.ProcessGroup) -> PeerAllReduce | None:
        """What sums the histograms [size] of all layers, or None: their process group. Says which, once. Collective at
        the first call; group as of `of`. Raises MacsNotActive where --macs-all-reduce peer cannot be had.
        """
        if self.config.all_reduce == "group":
            return None
        if self._sum_size is None:
            self._sum_size = size
            why = self._no_sum(group)
            if why and self.config.all_reduce == "peer":
                raise MacsNotActive(f"--macs-all-reduce peer: {why}; pass --macs-all-reduce group, or auto")
            if not why:
                needed = PeerAllReduce.region_bytes(dist.get_world_size(group), size)
                self._sum = PeerAllReduce(peer_memory.share(needed, group), size)
                say_for_group(
                    f"one kernel over the peers' memory sums the exchange: {needed / 1e6:.1f} MB a rank", group
                )
            else:
                say_for_group(f"the process group sums the exchange: {why}", group)
        return self._sum if size == self._sum_size else None

    def _no_sum(self, group: dist.ProcessGroup) -> str:
        """Why peers' memory is not used for it, or ""."""
        ranks = dist.get_world_size(group)
        reasons = (
            (self.config.is_off, "MACS is off"),
            (self.config.exchange != "group", "--macs-exchange local, and nothing is exchanged"),
            (ranks > limit("peers"), f"{ranks} ranks, at most {limit('peers')}"),
        )
        why = next((words for refused, words in reasons if refused), "")
        return why or peer_memory.unreachable(group, unfit_device())

    def check(self) -> None:
        """Raises MacsError for the first fault that one of them has recorded."""
        for transport in (*self._made, self._sum):
            if transport is not None:
                transport.check()

    def _line(self, why: str, sizes: Sizes) -> str:
        if why:
            return f"DeepEP carries every batch, behind the plan: {why}"
        blocks = self._made[0].num_blocks
        needed = sum(t.region_bytes(self.config, sizes, blocks) for t in self._made)
        saved = sum(t.saved_bytes(self.config, sizes) for t in self._made)
        return (
            f"the fused dispatch carries planned low-latency batches: {needed / 1e6:.0f} MB a rank, "
            f"{saved / 1e6:.0f} MB less than room for every token of every rank"
        )


def say_for_group(line: str, group: dist.ProcessGroup) -> None:
    """Once for the group: rank 0 says it."""
    if dist.get_rank(group) == 0:
        say(line)


def unfit_device() -> str:
    """Why the kernels do not run here, or ""."""
    if ops.cuda_backend() != "cuda":
        return "this build has no CUDA kernels"
    major, minor = torch.cuda.get_device_capability()
    return "" if major == COMPUTE_CAPABILITY else f"compute capability {major}.{minor}, and the kernels are for 9.0"


def make(config: MacsConfig, sizes: Sizes, group: dist.ProcessGroup) -> FusedDispatch:
    """A fused dispatch over memory of its own. Collective."""
    own = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    num_blocks = min(peer_memory.everyone(own, group))
    size = FusedDispatch.region_bytes(config, sizes, num_blocks)
    return FusedDispatch(config, sizes, peer_memory.share(size, group), num_blocks)

"""Whether the fused dispatch carries a process's planned batches, and the ones it has: one for each half of a batch."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from . import ops, peer_memory
from .compat import no_low_latency
from .config import MacsConfig
from .errors import MacsNotActive
from .fused import FusedDispatch, Sizes, unsupported

COMPUTE_CAPABILITY = 9  # Hopper: what the kernels are built and were measured for


class Transports:
    """Made by the first MoE layer that asks, and shared by all: their dispatches follow one another."""

    def __init__(self, config: MacsConfig) -> None:
        self.config = config
        self._sizes: Sizes | None = None
        self._made: list[FusedDispatch] = []

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
            why = no_low_latency(self.config, mode) or (overlaps and "--enable-single-batch-overlap")
            why = why or unsupported(self.config, sizes) or unfit_device() or peer_memory.unreachable(group)
            if why and self.config.dispatch == "fused":
                raise MacsNotActive(f"--macs-dispatch fused: {why}; pass --macs-dispatch deepep, or auto")
            if not why:
                self._made = [make(self.config, sizes, group) for _ in range(halves)]
            if dist.get_rank(group) == 0:
                print(f"sglang-macs: {self._line(why)}", file=sys.stderr, flush=True)
        return self._made if sizes == self._sizes else []

    def check(self) -> None:
        """Raises MacsError for the first fault that one of them has recorded."""
        for transport in self._made:
            transport.check()

    def _line(self, why: str) -> str:
        if why:
            return f"DeepEP carries every batch, behind the plan: {why}"
        blocks = self._made[0].num_blocks
        needed = sum(t.region_bytes(self.config, self._sizes, blocks) for t in self._made)
        saved = sum(t.saved_bytes(self.config, self._sizes) for t in self._made)
        return (
            f"the fused dispatch carries planned low-latency batches: {needed / 1e6:.0f} MB a rank, "
            f"{saved / 1e6:.0f} MB less than room for every token of every rank"
        )


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

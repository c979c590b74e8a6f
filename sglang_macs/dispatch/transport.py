"""What ranks share memory for, and whether they may: the fused dispatch, one for each half of a batch, and the plan's
all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
        self._fed: FusedDispatch | None = None  # whose rows the experts have begun with
        self.plans = False  # whether planned batches go through the fused dispatch
        self._sum_size: int | None = None  # once a layer has asked
        self._sum: PeerAllReduce | None = None

    def of(self, sizes: Sizes, halves: int, mode: str, overlaps: bool, group: dist.ProcessGroup) -> list[FusedDispatch]:
        """One for each half, or none: DeepEP carries. Says which, once. Collective at the first call.

        mode: DeepEP's, "auto", "normal" or "low_latency". overlaps: combine begins inside the experts' GEMM.
        group: on the host, in the order of the EP ranks.
        Raises MacsNotActive where --macs-dispatch fused cannot be had.
        """
        if not self.config.may_fuse:
            return []
        if self._sizes is None:
            self._sizes = sizes
            why = "--deepep-mode normal" if mode == "normal" else "--enable-single-batch-overlap" if overlaps else ""
            why = why or unsupported(self.config, sizes) or peer_memory.unreachable(group, unfit_device())
            if why and self.config.dispatch == "fused":
                raise MacsNotActive(f"--macs-dispatch fused: {why}; pass --macs-dispatch deepep, or auto")
            if not why:
                self._made = [make(self.config, sizes, group) for _ in range(halves)]
                self.plans = mode == "low_latency" or self.config.decode
            say_for_group(self._line(why), group)
        return self._made if sizes == self._sizes else []

    @property
    def region_bytes(self) -> int:
        """Of a rank, for the fused dispatch; 0 without."""
        return sum(made.region_bytes(made.sizes, made.num_blocks) for made in self._made)

    def state(self) -> dict[str, int]:
        """For `GET /server_info`: the memory of a rank, and the dispatches that the fused kernels have carried, those
        of replayed graphs too. Waits for the current stream.
        """
        return {"bytes": self.region_bytes, "rounds": sum(made.epoch() for made in self._made)}

    def place_outputs(self, inputs: Tensor, outputs: Tensor) -> None:
        """Before each grouped GEMM of experts: the last of a layer that the fused dispatch has fed writes its result
        where it is combined. The first one is over the rows; its own result, though it may have the shape, is not it.
        """
        if fed := next((made for made in self._made if made.holds(inputs)), None):
            self._fed = fed
        elif self._fed is not None and self._fed.lend(outputs):
            self._fed = None

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

    @property
    def awaits_peers(self) -> bool:
        """Whether kernels of this process wait for those of other ranks, and may give up."""
        return bool(self._waiting())

    def check(self) -> None:
        """Behind each pass, before it is done. Raises MacsError for the first fault that one of them has recorded."""
        for transport in self._waiting():
            transport.check()

    def check_arrived(self) -> None:
        """As `check`, once a pass is done: whether that pass went well."""
        for transport in self._waiting():
            transport.check_arrived()

    def _waiting(self) -> list[FusedDispatch | PeerAllReduce]:
        return [*self._made, *([] if self._sum is None else [self._sum])]

    def _line(self, why: str) -> str:
        if why:
            return f"DeepEP carries every batch, behind the plan: {why}"
        memory = f"{self.region_bytes / 1e6:.0f} MB a rank for {self._made[0].sizes.max_tokens} tokens of every rank"
        return f"the fused dispatch carries every low-latency batch: {memory}"


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


def _num_sms(group: dist.ProcessGroup) -> int:
    """Of the current device that may be filled. Blocks of all ranks have to run at once: shares of a device that ranks
    have in common (CUDA MPS) need not lie side by side, and a tenth is left. Collective.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpus = peer_memory.everyone(str(properties.uuid), group)
    shared = len(set(gpus)) < len(gpus)
    return properties.multi_processor_count * 9 // 10 if shared else properties.multi_processor_count


def make(config: MacsConfig, sizes: Sizes, group: dist.ProcessGroup) -> FusedDispatch:
    """A fused dispatch over memory of its own. Collective."""
    num_blocks = min(peer_memory.everyone(_num_sms(group), group))
    size = FusedDispatch.region_bytes(sizes, num_blocks)
    return FusedDispatch(config, sizes, peer_memory.share(size, group), num_blocks)

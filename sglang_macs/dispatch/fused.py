"""The fused dispatch and combine (docs/design/fused_dispatch.md) of one expert-parallel group: its region, and the
launches over it. One dispatch is under way at a time, from `send` or `carry` to `combine`; all layers share it.

Everything that changes from dispatch to dispatch lies in the region, the epoch too: what is captured in a CUDA graph
may be replayed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..choices import FORMATS
from ..comm import peer_status
from ..comm.peer_memory import PeerMemory, everyone
from ..config import MacsConfig
from ..errors import MacsError
from ..ops.definitions import limit
from ..plan.plan import Plan, PlanResult
from ..plan.tokens import RoutedTokens

# Of a wait for a peer: longer than a rank is late, shorter than an operator waits. In the first epochs a rank may
# compile kernels that the others, who wait for it here, do not need: a minute with empty caches. In a CUDA graph nobody
# compiles, and SGLang's schedulers have met before they replay one.
TIMEOUT_NS, FIRST_TIMEOUT_NS, FIRST_EPOCHS = 30 * 10**9, 200 * 10**9, 4096
CAPTURED_TIMEOUT_NS = 8 * 10**9
SCALE_ALIGNMENT = 4  # rows; DeepGEMM reads columns of f32 scales by TMA, at 16 bytes


@dataclass(frozen=True)
class Sizes:
    """Of a model's MoE layers and their group; experts are physical ones, copies counted; max_tokens: of a rank in one
    dispatch.
    """

    num_ranks: int
    num_experts: int
    top_k: int
    max_tokens: int
    hidden_size: int


def timeout_ns(epoch: int) -> int:
    """Of the waits of a dispatch that is launched now, the `epoch`-th of this host."""
    if torch.cuda.is_current_stream_capturing():
        return CAPTURED_TIMEOUT_NS
    return FIRST_TIMEOUT_NS if epoch <= FIRST_EPOCHS else TIMEOUT_NS


def unsupported(config: MacsConfig, sizes: Sizes) -> str:
    """Why the fused dispatch does not take this, in words, or ""."""
    hidden_sizes = range(limit("fused_min_hidden"), limit("fused_max_hidden") + 1, limit("fused_hidden_step"))
    numbers = (
        (sizes.num_ranks, "{} ranks", "peers"),
        (sizes.num_experts, "{} experts", "fused_experts"),
        (sizes.top_k, "top-{}", "fused_top_k"),
        (sizes.max_tokens, "{} tokens a rank", "fused_tokens"),
        (sizes.max_tokens * sizes.top_k, "{} assignments a rank", "fused_slots"),
        (config.reroute_rounds, "{} rounds of re-routing", "fused_reroute_rounds"),
    )
    reasons = (
        (config.is_off, "MACS is off"),
        (config.has_own_importance, f"--macs-importance {config.importance}, and its kernel calls no Python"),
        (config.exchange != "group", "--macs-exchange local, and it decides over the group"),
        *((got > limit(most), f"{words.format(got)}, at most {limit(most)}") for got, words, most in numbers),
        (
            sizes.hidden_size not in hidden_sizes,
            f"hidden size {sizes.hidden_size}, no multiple of {hidden_sizes.step} in "
            f"{hidden_sizes.start}..{hidden_sizes.stop - 1}",
        ),
    )
    return next((words for refused, words in reasons if refused), "")


def region_shape(sizes: Sizes, format: str, num_blocks: int) -> ops.RegionShape:
    """Experts side by side, as DeepGEMM's masked grouped GEMM takes them, each with room for every token of every rank:
    a batch that is not planned knows no bound.
    """
    rows = -(-sizes.num_ranks * sizes.max_tokens // SCALE_ALIGNMENT) * SCALE_ALIGNMENT
    local = sizes.num_experts // sizes.num_ranks
    return ops.RegionShape(
        sizes.num_ranks,
        sizes.num_experts,
        sizes.top_k,
        sizes.max_tokens,
        sizes.hidden_size,
        num_blocks,
        FORMATS.index(format),
        rows,
        local * rows,
    )


class FusedDispatch:
    """Dispatch and combine over one region.

    Args:
        config, sizes: what `unsupported` takes.
        memory: at least `region_bytes` of every rank, zero-filled.
        num_blocks: SMs of a launch; the same on all ranks.
    """

    def __init__(self, config: MacsConfig, sizes: Sizes, memory: PeerMemory, num_blocks: int) -> None:
        self.config, self.sizes, self.memory, self.num_blocks = config, sizes, memory, num_blocks
        self.shape: ops.RegionShape | None = None  # once the format of the rows is known
        self._launched = 0  # launched or captured here; the region counts those that have run
        self._layer = -1  # whose rows were sent last
        self._to_receive = False  # whether a launch has yet to await them
        self._watch = peer_status.Watch()

    @staticmethod
    def region_bytes(sizes: Sizes, num_blocks: int) -> int:
        """Of a rank's region, whatever the format of the rows."""
        return max(ops.fused_layout(region_shape(sizes, f, num_blocks)).bytes for f in FORMATS)

    def fits(self, format: str) -> bool:
        """Whether rows of this format may be sent: one region holds those of one. The first `send` or `carry` says
        which, on all ranks alike.
        """
        return self.shape is None or self._format == format

    def send(
        self,
        plan: Plan,
        layer_id: int,
        format: str,
        tokens: RoutedTokens,
        *,
        awaits: bool = False,
    ) -> PlanResult:
        """Plans and sends; T <= sizes.max_tokens. Collective.

        awaits: the same launch awaits everybody's rows, and `receive` launches nothing. `group` and `own` of the
        result hold only the group's sums: no histogram is made. Raises MacsError if the rows sent before were not
        received: their scales would be taken for those of these.
        """
        self._begin(layer_id, format, awaits)
        logits = None if self.config.reroute == "none" or tokens.router_logits is None else tokens.router_logits.float()
        ids, weights, weight, cut, counts, sums = ops.fused_dispatch(
            *self._where(),
            tokens.hidden_states,
            tokens.topk_ids,
            tokens.topk_weights,
            tokens.segment,
            logits,
            num_segments=tokens.num_segments,
            phase="both" if awaits else "send",
            **(self._wait_options() | plan.fused_options(tokens.hidden_states.device)),
        )
        return PlanResult(ids, weights, weight, sums, sums, cut, counts)

    def carry(
        self,
        layer_id: int,
        format: str,
        hidden_states: Tensor,
        topk_ids: Tensor,
        *,
        awaits: bool = False,
    ) -> None:
        """Sends every row to where it was routed, unplanned; the rest as of `send`. Collective."""
        self._begin(layer_id, format, awaits)
        phase = "both" if awaits else "send"
        ops.fused_carry(*self._where(), hidden_states, topk_ids, phase=phase, **self._wait_options())

    def receive(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """What all ranks sent: rows [E_l, M, H], scales [E_l, M, H / 128] f32 (column-major; None for bf16), and rows
        of each expert [E_l] i32.
        """
        if self._to_receive:
            ops.fused_receive(*self._where(), **self._wait_options())
        self._to_receive = False
        return self.rows(), self.scales(), self._part("received", torch.int32, self._local)

    def holds(self, inputs: Tensor) -> bool:
        """Whether a GEMM over `inputs` is over the rows that were received."""
        return self.shape is not None and inputs.data_ptr() == self.rows().data_ptr()

    def lend(self, outputs: Tensor) -> bool:
        """Makes `outputs`, which nobody has written yet, the memory that combine reads; False: they are of another
        shape than the experts' outputs [E_l, M, H] bf16.
        """
        place = self._outputs()
        if outputs.shape != place.shape or outputs.dtype != place.dtype:
            return False
        outputs.set_(place)
        return True

    def offer(self, outputs: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """The experts' outputs [E_l, M, H] bf16, to whoever sent the rows."""
        self._combine(outputs, topk_ids, topk_weights, "send")

    def combine(self, topk_ids: Tensor, topk_weights: Tensor, outputs: Tensor | None = None) -> Tensor:
        """[T, H] bf16 behind `offer` of all ranks, or with `outputs` in one launch with it; ids and weights [T, K] as
        they were sent.
        """
        return self._combine(outputs, topk_ids, topk_weights, "receive" if outputs is None else "both")

    def _outputs(self) -> Tensor:
        """[E_l, M, H] bf16, what combine reads."""
        return self._part("outputs", torch.bfloat16, self._local, self._region.expert_rows, self.sizes.hidden_size)

    def epoch(self) -> int:
        """Of the last dispatch that has run, a replayed one too. Waits for the current stream."""
        return int(self._part("epoch", torch.int32, 1)) if self.shape is not None else 0

    def rows(self) -> Tensor:
        """[E_l, M, H] bf16 or e4m3; made anew every time, since SGLang's runner disposes of what it is handed."""
        dtype = torch.bfloat16 if self._format == "bf16" else torch.float8_e4m3fn
        return self._part("rows", dtype, self._local, self._region.expert_rows, self.sizes.hidden_size)

    def scales(self) -> Tensor | None:
        """[E_l, M, H / 128] f32 over column-major memory, or None."""
        if self._format == "bf16":
            return None
        words = self.sizes.hidden_size // 128
        return self._part("scales", torch.float32, self._local, words, self._region.expert_rows).transpose(1, 2)

    def check(self) -> None:
        """Raises MacsError once a wait has given up or a peer was found wrong. Never makes the host wait: it looks at
        the status of an earlier call, and sends for the next.
        """
        if self.shape is not None:
            self._raise_for(self._watch.look(self._status()))

    def check_arrived(self) -> None:
        """As `check`, of what was sent for already: behind a pass, whether that pass went well."""
        self._raise_for(self._watch.arrived())

    def recover(self, group: dist.ProcessGroup) -> None:
        """Behind a fault, with every rank here: faults are cleared, and all go on from one epoch. Collective.

        group: on the host (gloo), of the ranks that are left; the same number as before.
        """
        torch.cuda.synchronize()
        self._part("epoch", torch.int32, 1).fill_(max(everyone(self.epoch(), group)) + 1)
        self._status().zero_()
        self._part("row_scales", torch.uint8, self._layout.scales - self._layout.row_scales).zero_()
        self._to_receive = False
        self._watch = peer_status.Watch()
        torch.cuda.synchronize()
        dist.barrier(group)

    @property
    def _region(self) -> ops.RegionShape:
        assert self.shape is not None, "nothing was sent"
        return self.shape

    @property
    def _format(self) -> str:
        return FORMATS[self._region.format]

    @property
    def _local(self) -> int:
        return self.sizes.num_experts // self.sizes.num_ranks

    def _set_format(self, format: str) -> None:
        if self.shape is None:
            self.shape = region_shape(self.sizes, format, self.num_blocks)
            self._layout = ops.fused_layout(self.shape)
        elif self._format != format:
            raise MacsError("fused dispatch", f"rows in {format}", f"{self._format}, as the layers before", "")

    def _begin(self, layer_id: int, format: str, awaits: bool) -> None:
        if self._to_receive:
            raise MacsError("fused dispatch", f"layer {layer_id} sent", f"layer {self._layer} received before", "")
        self._set_format(format)
        self._layer, self._to_receive = layer_id, not awaits
        self._launched += 1

    def _wait_options(self) -> dict[str, Any]:
        return {"timeout_ns": timeout_ns(self._launched), "layer": self._layer}

    def _where(self) -> tuple[Tensor, list[int], int, ops.RegionShape]:
        return self.memory.own, self.memory.addresses, self.memory.rank, self._region

    def _combine(self, outputs: Tensor | None, topk_ids: Tensor, topk_weights: Tensor, phase: str) -> Tensor:
        if outputs is not None and outputs.data_ptr() == self._outputs().data_ptr():
            outputs = None  # they lie where they are read
        return ops.fused_combine(*self._where(), topk_ids, topk_weights, outputs, phase=phase, **self._wait_options())

    def _part(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        start = getattr(self._layout, name)
        return self.memory.own[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def _status(self) -> Tensor:
        return self._part("status", torch.uint8, peer_status.SIZE)

    def _raise_for(self, found: peer_status.Record | None) -> None:
        if found is None:
            return
        what = f"epoch {found.epoch}, {found.seen} for {found.expected}"
        raise MacsError(
            "fused dispatch",
            f"{found.words} in layer {found.layer}, says rank {self.memory.rank} ({what})",
            f"every rank within {found.limit_ms / 1000:g} s",
            "Look at that rank's log, or serve with --macs-dispatch deepep.",
        )

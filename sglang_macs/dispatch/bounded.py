"""Bounded dispatch: DeepEP's normal mode without a count on the host (docs/design/bounded.md).

A rank knows before anything is sent how many tokens and rows it can get, at most: from the plan's bound, or without one
from the group's tokens. DeepEP is told that number (`num_worst_tokens`) and gives no count back; the rows go into a
buffer of that size, by expert, and where each expert ends is known to the device alone. So the host never waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..comm.peer_status import Watch
from ..config import MacsConfig
from ..errors import MacsError
from ..plan import batch
from ..plan.plan import Plan
from .planner import LayerPlanner
from .transport import row_format

TILE = 128  # rows of a tile of DeepGEMM's contiguous grouped GEMM, which begins at every expert
# What a row buffer may hold beyond the mean load, in bf16 rows: more is left to DeepEP, whose buffers fit the rows that
# come. Only a bound far from the mean gets there: infinite gamma on many ranks.
SPARE_BYTES = 2 << 30
SMALLEST = 256  # rows of a size class


class Sizes(NamedTuple):
    """Of an MoE layer and its group; experts are physical ones, copies counted."""

    num_ranks: int
    num_experts: int
    top_k: int
    hidden_size: int

    @classmethod
    def of(cls, plan: Plan, top_k: int, hidden_size: int) -> Sizes:
        return cls(plan.num_ranks, plan.num_physical, top_k, hidden_size)

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return self.num_experts // self.num_ranks


@dataclass(frozen=True)
class Room:
    """What a rank can get in one dispatch, at most. tokens: received; rows: of the buffer, tiles filled up."""

    tokens: int
    rows: int


def most_assignments(config: MacsConfig, sizes: Sizes, group_rows: int, *, planned: bool) -> int:
    """Assignments that a rank can get of `group_rows` tokens of the group; planned: under the bounds of `config`."""
    worst = group_rows * min(sizes.top_k, sizes.local)
    most, assignments = math.inf, group_rows * sizes.top_k
    if planned and config.load == "rows" and config.scope == "rank":
        most = config.gamma * assignments / sizes.num_ranks
    elif planned and config.load == "rows":
        most = sizes.local * (config.c_min + config.gamma * assignments / sizes.num_experts * (1 + config.rho / 2) + 1)
    return worst if math.isinf(most) else min(worst, math.floor(most) + 1)  # + 1: the bound rounds in another order


def room(config: MacsConfig, sizes: Sizes, group_rows: int, *, planned: bool) -> Room:
    """For a dispatch of `group_rows` tokens of the group: the same on all ranks. More rows than a rank has experts."""
    rows = most_assignments(config, sizes, group_rows, planned=planned)
    filled_up = rows + min(rows, sizes.local) * (TILE - 1)
    return Room(min(group_rows, rows), max(filled_up // TILE, sizes.local // TILE + 1) * TILE)


def most_tokens(sizes: Sizes, group_tokens: int, attn_tp_size: int) -> int:
    """Of the group in one dispatch. Ranks that share a batch pad it to equal shares, and padding may be routed."""
    return group_tokens + sizes.num_ranks // attn_tp_size * (attn_tp_size - 1)


def spare_bytes(sizes: Sizes, group_rows: int, rows: int) -> int:
    """Of a buffer of `rows` rows in bf16, what the mean load does not fill."""
    return max(0, rows - group_rows * sizes.top_k // sizes.num_ranks) * sizes.hidden_size * 2


def size_class(rows: int) -> int:
    """The next of sizes that are an eighth of a power of two apart, so that at most an eighth is filled up."""
    step = max(SMALLEST, 1 << max(0, (rows - 1).bit_length() - 4))
    return max(1, -(-rows // step)) * step


class Index(NamedTuple):
    """Where the rows of a dispatch lie, i32. place [N, K]: row of each assignment, negative: none; expert_end [E_l]:
    behind the last row of each expert; counts: scratch.
    """

    place: Tensor
    expert_end: Tensor
    counts: Tensor


class Workspace:
    """Index tensors over memory that all layers of a process share: one dispatch is under way at a time. Memory that
    became too small stays: CUDA graphs have its address.

    lost: [1] i32, assignments that found no row in their buffer, which cannot be.
    """

    def __init__(self, device: torch.device) -> None:
        self.lost = torch.zeros(1, dtype=torch.int32, device=device)
        self._memory = [torch.empty(0, dtype=torch.int32, device=device)]
        self._sizes: tuple[int, ...] = ()
        self._index: Index | None = None

    def index(self, tokens: int, top_k: int, num_experts: int) -> Index:
        """For `tokens` received tokens; the same tensors as long as the sizes are."""
        sizes = (tokens, top_k, num_experts)
        if self._index is None or sizes != self._sizes:
            parts = [tokens * top_k, num_experts, ops.bounded_workspace_size(tokens, num_experts)]
            if sum(parts) > self._memory[-1].numel():
                self._memory.append(self._memory[-1].new_empty(max(sum(parts), 2 * self._memory[-1].numel())))
            place, *others = self._memory[-1][: sum(parts)].split(parts)
            self._sizes, self._index = sizes, Index(place.view(tokens, top_k), *others)
        return self._index


class Received(NamedTuple):
    """One dispatch as DeepEP delivers it, and the buffer's rows. tokens [N, H]; scales [N, H / 128] f32 or None;
    topk_ids [N, K], this rank's experts from 0 on, -1 behind the tokens that came; topk_weights [N, K].
    """

    tokens: Tensor
    scales: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    num_experts: int
    rows: int
    workspace: Workspace

    def permute(self) -> tuple[Tensor, Tensor | None, Index]:
        """(rows [M, H], their scales [M, H / 128] over column-major memory or None, index)."""
        tokens, top_k = self.topk_ids.shape
        index = self.workspace.index(tokens, top_k, self.num_experts)
        rows = self.tokens.new_empty(self.rows, self.tokens.shape[1])
        scales = None if self.scales is None else self.scales.new_empty(self.scales.shape[1], self.rows)
        given = (self.topk_ids, self.tokens, self.scales, self.num_experts, TILE)
        made = (index.place, index.expert_end, rows, scales)
        ops.bounded_permute(*given, *made, index.counts, self.workspace.lost)
        return rows, None if scales is None else scales.t(), index

    def gather(self, outputs: Tensor, place: Tensor) -> Tensor:
        """[N, H] bf16: each token's sum of weight times output [M, H]; nothing is written behind those that came."""
        tokens = outputs.new_empty(place.shape[0], outputs.shape[1])
        ops.bounded_gather(outputs, place, self.topk_weights, tokens)
        return tokens


class BoundedDispatch:
    """What the MoE layers of a process share: whether this can be had, the workspace, and its fault.

    Counted and uncounted dispatches must not be under way together. DeepEP's kernels write their counts to one place,
    whether the host wants them or not, and a host that waits there takes the count of any dispatch before its own
    (`notify_dispatch` in csrc/kernels/legacy/intranode.cu): buffers of wrong sizes, and ranks that wait for rows that
    never come. So a rank that is about to count lets its GPU finish first (`before_count`).

    Args:
        config: of the server.
        say: takes a line for the log.
        unfit: why the kernels do not run on some rank's device, or "": the same on all ranks.
        stream: the stream that dispatches are queued on; has synchronize().
    """

    def __init__(
        self, config: MacsConfig, say: Callable[[str], None], unfit: str = "", stream: Callable[[], Any] | None = None
    ) -> None:
        self.config, self._unfit = config, unfit
        self._stream = stream or torch.cuda.current_stream
        self._uncounted: Any = None  # stream with dispatches that may be under way
        self._tell = cache(say)  # each line once
        self._now: batch.Batch | None = None  # of the last dispatch, and what was answered in its pass
        self._found: dict[tuple, Room | None] = {}
        self._layers: set[tuple[Sizes, int]] = set()
        self.most_rows = 0  # of a buffer, as far as is known
        self._workspace: Workspace | None = None
        self._watch = Watch(lambda lost: int(lost) or None)

    def join(self, sizes: Sizes, attn_tp_size: int) -> None:
        """One layer that is dispatched here."""
        self._layers.add((sizes, attn_tp_size))

    def needs_plan(self, group_tokens: int) -> bool:
        """Whether layers of such a batch that are left alone would have DeepEP count on the host, for want of the bound
        that a plan gives: that costs more than a plan.
        """
        asked = ((sizes, most_tokens(sizes, group_tokens, attn_tp_size)) for sizes, attn_tp_size in self._layers)
        return any(
            not self._fits(sizes, tokens, planned=False) and self._fits(sizes, tokens, planned=True)
            for sizes, tokens in asked
        )

    def _fits(self, sizes: Sizes, group_rows: int, *, planned: bool) -> bool:
        rows = room(self.config, sizes, group_rows, planned=planned).rows
        return spare_bytes(sizes, group_rows, rows) <= SPARE_BYTES

    def expect(self, sizes: Sizes, rank_rows: int) -> None:
        """Batches of a layer in which no rank has more than `rank_rows` rows: how many a buffer can have, at most."""
        tokens = size_class(rank_rows) * sizes.num_ranks
        found = (room(self.config, sizes, tokens, planned=planned).rows for planned in (True, False))
        fitting = [rows for rows in found if spare_bytes(sizes, tokens, rows) <= SPARE_BYTES]
        self.most_rows = max(self.most_rows, *fitting, 0)

    def workspace(self, device: torch.device) -> Workspace:
        """Made by the first dispatch."""
        if self._workspace is None:
            self._workspace = Workspace(device)
        return self._workspace

    def room(
        self, sizes: Sizes, attn_tp_size: int, format: str | None, domains: int, planned: bool = True
    ) -> Room | None:
        """For the batch that is running, or None: DeepEP's own way, as on all ranks. Says why, once a reason.

        attn_tp_size: ranks that share a batch; format: of the rows, None = not one of ours; domains: NVLink domains of
        the group; planned: whether the layer that asks is planned where the batch is.
        """
        now, asked = batch.current(), (sizes, attn_tp_size, format, domains, planned)
        if now is not self._now:
            self._now, self._found = now, {}
        if asked not in self._found:  # else another layer of the pass has asked
            self._found[asked] = self._room_for(now, *asked)
        return self._found[asked]

    def _room_for(
        self, now: batch.Batch, sizes: Sizes, attn_tp_size: int, format: str | None, domains: int, planned: bool
    ) -> Room | None:
        if now.skip in batch.UNKNOWN or not now.group_tokens:
            return None
        tokens = most_tokens(sizes, now.group_tokens, attn_tp_size)
        if now.skip:  # ranks may be padded to the fullest
            tokens = max(tokens, sizes.num_ranks * -(-now.most_tokens // attn_tp_size))
        planned = planned and not now.skip and not now.leaves_alone  # rows left alone come beside those of the bound
        found = room(self.config, sizes, tokens, planned=planned)
        spare = spare_bytes(sizes, tokens, found.rows)
        reasons = (
            (format is None, "the rows are neither bf16 nor FP8 with a scale for 128 features"),
            (domains > 1, f"the group spans {domains} NVLink domains"),
            (spare > SPARE_BYTES, f"a row buffer would hold more than {SPARE_BYTES >> 30} GiB beyond the mean load"),
        )
        why = next((words for refused, words in reasons if refused), "") or self._unfit
        self._tell(f"DeepEP counts on the host: {why}" if why else self._line(sizes, planned))
        return None if why else found

    def sent(self) -> None:
        """Behind every dispatch without a count."""
        self._uncounted = self._stream()

    def before_count(self) -> None:
        """Before a dispatch that counts, on every rank: the host waits for its GPU."""
        if self._uncounted is not None:
            self._uncounted.synchronize()
            self._uncounted = None

    def check(self) -> None:
        """Raises MacsError once rows were lost; never makes the host wait (`Watch`)."""
        if self._workspace is not None and (lost := self._watch.look(self._workspace.lost)):
            raise MacsError(
                "bounded dispatch",
                f"{lost} assignments that found no row",
                "as many rows as the bound lets through",
                "Serve with --macs-dispatch deepep, and report it.",
            )

    def _line(self, sizes: Sizes, planned: bool) -> str:
        many = 1 << 20  # tokens
        bound, worst = (most_assignments(self.config, sizes, many, planned=p) for p in (planned, False))
        mean = many * sizes.top_k / sizes.num_ranks
        return (
            f"no count on the host for {'planned' if planned else 'unplanned'} batches in normal mode: row buffers for "
            f"{bound / mean:.2f} times the mean load, {worst / mean:.2f} times without a bound"
        )


class BoundedNormal:
    """One layer's normal-mode implementation, `impl`, with the bounded dispatch in it.

    Args:
        impl: SGLang's; its dispatch_b and _get_buffer are replaced, and its streams no longer overlap.
        shared: of the process.
        planner: of the layer.
        sizes: of the layer.
        make_output: (DeepEP's output, `Received`) -> what the runner gets.
    """

    def __init__(
        self,
        impl: Any,
        shared: BoundedDispatch,
        planner: LayerPlanner,
        sizes: Sizes,
        make_output: Callable[[Any, Received], Any],
    ) -> None:
        self.impl, self.shared, self.planner, self.sizes, self.make_output = impl, shared, planner, sizes, make_output
        shared.join(sizes, planner.attn_tp[1])
        self._room: Room | None = None  # of the dispatch that is being made
        self._own_buffer = impl._get_buffer
        impl._get_buffer = self._get_buffer
        # DeepEP's stream and the layer's take turns, as they do without overlap anyway. Tensors that both use would be
        # free again only when the GPU has got there: a host that runs ahead would hold the buffers of many layers.
        impl.async_finish = False
        impl.dispatch_b = partial(self._dispatch_b, impl.dispatch_b)

    def _get_buffer(self) -> Any:
        buffer = self._own_buffer()
        if self._room is None:
            return buffer
        dispatch = partial(buffer.dispatch, num_worst_tokens=self._room.tokens)
        return SimpleNamespace(get_dispatch_layout=buffer.get_dispatch_layout, dispatch=dispatch)

    def in_use(self) -> None:
        """Tells SGLang, whose low-latency mode cleans its buffers behind normal mode: a graph's replay does not."""
        self._own_buffer()

    def room(self) -> Room | None:
        """For the batch that is running (`BoundedDispatch.room`)."""
        domains = self._own_buffer().runtime.get_num_rdma_ranks()
        attn_tp_size = self.planner.attn_tp[1]
        return self.shared.room(self.sizes, attn_tp_size, row_format(self.impl), domains, self.planner.plans())

    def _dispatch_b(self, original: Callable, *state: Any) -> Any:
        found = self.room()
        if found is None:
            self.shared.before_count()
            return original(*state)
        self._room = found
        try:
            output = original(*state)
        finally:
            self._room = None
        self.shared.sent()
        self.planner.count_bounded()
        tokens, scales, ids, weights = output[:4]
        workspace = self.shared.workspace(tokens.device)
        received = Received(tokens, scales, ids, weights, self.sizes.local, found.rows, workspace)
        return self.make_output(output, received)

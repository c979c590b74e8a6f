"""A MoE layer under the bounded dispatch as one CUDA graph (docs/design/bounded.md).

Nothing of such a layer depends on the host: plan, exchange, dispatch, experts and combine are some twenty launches
whose sizes are known before. A graph makes one launch of them. Its inputs lie where it was captured, so that a batch is
copied there, filled up to the next size class by rows that no expert gets.

A graph or the launches themselves run the same kernels. So ranks need not agree on which it is, and what keeps one of
them from capturing costs the others nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import batch
from ..plan.plan import PlanResult
from .alias import alias
from .bounded import BoundedNormal, size_class
from .planner import LayerPlanner

MOST_KEYS = 64  # kinds of batches that a layer has graphs for

Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    """What graphs read: hidden [M, H], topk_ids [M, K], topk_weights [M, K] f32, router_logits [M, E], and the segment
    [M] i32 of the rows.
    """

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    router_logits: Tensor
    segment: Tensor

    @classmethod
    def like(cls, rows: int, given: tuple[Tensor, ...]) -> Inputs:
        hidden, ids, weights, logits = (x.new_zeros(rows, *x.shape[1:]) for x in given)
        return cls(hidden, ids, weights, logits, torch.empty(rows, dtype=torch.int32, device=hidden.device))

    def first(self, rows: int) -> Inputs:
        return Inputs(*(x[:rows] for x in self))


class _Key(NamedTuple):
    """What a graph is made for: rows of a rank; segments, 0 or a power of two; why the layer is not planned, or ""."""

    rows: int
    segments: int
    skip: str


class _Replay(NamedTuple):
    """A layer's graph, and what it writes. The memory is that of all graphs: it holds until the next one runs."""

    graph: torch.cuda.CUDAGraph
    output: Tensor
    result: PlanResult | None


class LayerGraphs:
    """What the graphs of a process share, of which one runs at a time: inputs, and a pool of memory.

    Args:
        say: takes a line for the log.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = cache(say)  # each line once
        self._pool: object = None
        self._stream: torch.cuda.Stream | None = None
        self._inputs: dict[Hashable, Inputs] = {}  # by the types and widths of what is given
        self.epoch = 0  # of the inputs: graphs of earlier ones must not run
        self.options = 0  # how often options have changed: graphs of earlier ones hold these
        self._filled: tuple = (None,)  # a batch's segment, and where it was copied to

    def fill(self, rows: int, given: tuple[Tensor, ...], planner: LayerPlanner) -> Inputs:
        """Copies a layer's batch [T, ...] to the inputs' first `rows` rows."""
        inputs, tokens = self._of(rows, given), given[0].shape[0]
        if tokens:
            for static, x in zip(inputs, given, strict=False):
                static[:tokens].copy_(x)
        if tokens < rows:
            inputs.topk_ids[tokens:].fill_(-1)
        segment = planner.segment(batch.current(), None, given[1])
        filled = segment, inputs.segment.data_ptr(), rows
        if self._filled[0] is not segment or self._filled[1:] != filled[1:]:  # else another layer of the pass has
            inputs.segment[:tokens].copy_(segment)
            inputs.segment[tokens:].fill_(batch.TEXT)
            self._filled = filled
        return inputs

    def _of(self, rows: int, given: tuple[Tensor, ...]) -> Inputs:
        """Inputs that grow: those that graphs have been captured with are theirs no longer (`epoch`)."""
        kind = tuple((x.dtype, x.shape[1:]) for x in given)
        made = self._inputs.get(kind)
        if made is None or made.hidden.shape[0] < rows:
            made = self._inputs[kind] = Inputs.like(1 << (rows - 1).bit_length(), given)
            self.epoch += 1
            self._pool = None
        return made.first(rows)

    def forget(self) -> None:
        """Options have changed: what was captured under earlier ones must not run."""
        self.options += 1
        self._pool = None

    def capture(self, forward: Callable[[], Tensor], results: list[PlanResult]) -> _Replay:
        """`forward` is captured, not run. results: where its plan is found."""
        self._stream = self._stream or torch.cuda.Stream()
        # torch takes no pool again that all graphs have left: so may those of inputs that have moved, or of a failure.
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                # Of this thread alone: NCCL's watchdog asks for events meanwhile.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    output = forward()
                finally:
                    graph.capture_end()
        except RuntimeError:
            self._pool = None
            raise
        return _Replay(graph, alias(output), _aliases(results[0]) if results else None)


class LayerGraph:
    """One layer: its forward as a graph, where its batch is one that it can be a graph for.

    Args:
        graphs: of the process.
        normal: the layer's bounded dispatch.
        carries: whether it carries the batch that is running; with --deepep-mode auto not that of a decode pass.
    """

    def __init__(self, graphs: LayerGraphs, normal: BoundedNormal, carries: Callable[[], bool]) -> None:
        self.graphs, self.normal, self.planner, self._carries = graphs, normal, normal.planner, carries
        self._replays: dict[_Key, _Replay | None] = {}  # None: has run once, so that all of it is compiled
        self._refused: set[_Key] = set()
        self._epoch = 0  # of the inputs that the graphs read
        self._options = 0  # under which they were captured

    def __call__(
        self, forward: Forward, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, router_logits: Tensor
    ) -> Tensor:
        """[T, H], what `forward` makes of the layer's batch: [T, H], [T, K], [T, K] and [T, E]."""
        given = hidden, topk_ids, topk_weights, router_logits
        if self._options != self.graphs.options:  # which batches there can be a graph for follows from them, too
            self._options, self._replays, self._refused = self.graphs.options, {}, set()
        key = self._key(batch.current(), hidden.shape[0])
        if key is None or not self._takes(key):
            return forward(*given)
        tokens = hidden.shape[0]
        inputs = self.graphs.fill(key.rows, given, self.planner)
        if self._epoch != self.graphs.epoch:
            self._epoch, self._replays = self.graphs.epoch, dict.fromkeys(self._replays)
        self.planner.observe(topk_ids, inputs.segment[:tokens])
        output, result = self._run(key, partial(forward, *inputs[:4]), inputs.segment)
        self.normal.shared.sent()
        self.planner.count_dispatch(batch.current())
        self.planner.count_bounded()
        if result is not None:
            self.planner.count_plan(result)
        return output[:tokens].clone()

    def _key(self, now: batch.Batch, tokens: int) -> _Key | None:
        """Of the graph for this rank's batch; None where it takes the launches themselves."""
        if now.skip in batch.UNKNOWN or not (now.most_tokens and tokens and self._carries()):
            return None
        proved = now.measured and not self.planner.plan.config.observes  # what is observed is counted before a graph
        if proved or now.leaves_alone or now.halves or now.clipped or self.planner.recorder is not None:
            return None
        rows = size_class(max(tokens, -(-now.most_tokens // self.planner.attn_tp[1])))
        segments = 1 << (now.num_segments - 1).bit_length() if now.num_segments else 0
        return _Key(rows, segments, now.skip_of(self.planner.layer_id))

    def _takes(self, key: _Key) -> bool:
        """Whether there is a graph, or can be one: DeepEP does not count on the host for such a batch."""
        if key in self._replays:
            return True
        if key in self._refused:
            return False
        if len(self._replays) == MOST_KEYS:
            self.graphs.say(f"batches of more than {MOST_KEYS} sizes: the others' MoE layers are no CUDA graphs")
            return False
        with batch.forward(self._batch(key)):
            if self.normal.room() is None:
                self._refused.add(key)
        return key not in self._refused

    def _batch(self, key: _Key, segment: Tensor | None = None) -> batch.Batch:
        """What a graph is captured in: a batch in which every rank has as many rows."""
        layer_id = self.planner.layer_id
        return batch.Batch(
            segment,
            key.segments,
            skip="" if key.skip == batch.NO_GAIN else key.skip,
            group_tokens=key.rows * self.normal.sizes.num_ranks,
            most_tokens=key.rows,
            no_gain=frozenset((layer_id,)) if key.skip == batch.NO_GAIN else frozenset(),
            of_rows=True,
        )

    def _run(self, key: _Key, forward: Callable[[], Tensor], segment: Tensor) -> tuple[Tensor, PlanResult | None]:
        """The layer's output, and what its plan leaves behind."""
        replay = self._replays.get(key)
        if replay is None and key in self._replays:
            replay = self._capture(key, forward, segment)
        if replay is not None:
            self.normal.in_use()
            replay.graph.replay()
            self.planner.counters.graphs += 1
            return replay.output, None if replay.result is None else replay.result.copy()
        with batch.forward(self._batch(key, segment)), self.planner.uncounted() as results:
            output = forward()
        if key not in self._refused:
            self._replays[key] = None
        return output, results[0] if results else None

    def _capture(self, key: _Key, forward: Callable[[], Tensor], segment: Tensor) -> _Replay | None:
        """The graph. None where there can be none, which the log says: the launches serve on."""
        with batch.forward(self._batch(key, segment)), self.planner.uncounted() as results:
            try:
                self._replays[key] = self.graphs.capture(forward, results)
            except RuntimeError as error:  # no memory left, say
                del self._replays[key]
                self._refused.add(key)
                self.graphs.say(f"MoE layers of {key.rows} rows are no CUDA graphs: {str(error).splitlines()[0]}")
        return self._replays.get(key)


def _aliases(result: PlanResult) -> PlanResult:
    """Not kept from other graphs of the pool, which take turns with this one."""
    return PlanResult(*(x if x is None else alias(x) for x in result))

"""Planning in front of one MoE layer's dispatches, whatever carries them, and the proof of what is sent. Any device."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.peer_all_reduce import PeerAllReduce
from ..observe import stats
from ..observe.beside import Observed
from ..observe.recorder import Recorder
from ..plan import batch
from ..plan.plan import Plan, PlanResult
from ..plan.tokens import RoutedTokens
from .acting import Acting


class Planned(NamedTuple):
    """What one layer dispatches: ids and weights [T, K]; the plan's result, if it planned.

    segment [T] is None for a batch that MACS leaves alone and does not count (decode, small): that path does nothing.
    left_alone: [T] bool, rows that went past the plan; None in a pass where no rank has any.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    segment: Tensor | None = None
    result: PlanResult | None = None
    left_alone: Tensor | None = None


class LayerPlanner:
    """Plans one MoE layer's dispatches, or leaves them alone, and counts what it did. Any device.

    Args:
        layer_id: for the counters.
        plan: the layer's plan; its config says what is done and proved.
        group: EP process group.
        counters: the process's `Stats`.
        attn_tp: (rank, size) of attention tensor parallelism, over which the rows were scattered.
        recorder: of --macs-trace.
        peers: sums histograms in place of the group's all-reduce.
        acting: of the process; is told what was planned.
        observed: of the process; is told what --macs-preset observe sees.
    """

    def __init__(
        self,
        layer_id: int,
        plan: Plan,
        group: dist.ProcessGroup,
        counters: stats.Stats,
        attn_tp: tuple[int, int] = (0, 1),
        recorder: Recorder | None = None,
        peers: PeerAllReduce | None = None,
        acting: Acting | None = None,
        observed: Observed | None = None,
    ) -> None:
        self.layer_id = layer_id
        self.plan = plan
        self.group = group
        self.counters = counters
        self.attn_tp = attn_tp
        self.recorder = recorder
        self.peers = peers
        self.acting = acting
        self.observed = observed
        self._aside: list[PlanResult] | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        router_logits: Tensor | None,
        half: int | None = None,
        plan: Callable[[RoutedTokens], PlanResult] | None = None,
    ) -> Planned:
        """Shapes as in `RoutedTokens`; every rank calls it for every dispatch, T = 0 included.

        half: 0 or 1 under two-batch overlap, which dispatches the halves of a batch one by one.
        plan: in place of the layer's own, where the dispatch itself plans and exchanges.
        """
        now = batch.current()
        skip = now.skip_of(self.layer_id)
        if self._aside is None:
            self.count_dispatch(now, half)
        if skip not in ("", "off", batch.NO_GAIN):
            return Planned(topk_ids, topk_weights)
        segment = self.segment(now, half, topk_ids)
        left_alone, planned_segment = now.left_alone_of(segment)
        if skip:
            if skip == batch.NO_GAIN and self.recorder is not None:
                routed = self._as_routed(hidden_states, topk_ids, topk_weights, planned_segment, now.num_segments)
                self._record(now, topk_ids, topk_weights, routed, planned=False)
            return Planned(topk_ids, topk_weights, segment, None, left_alone)
        taken, planned_ids = left_alone if self._makes_room(now) else None, topk_ids
        if left_alone is not None and taken is None:
            planned_ids = topk_ids.masked_fill(left_alone.unsqueeze(1), -1)
        tokens = RoutedTokens(
            hidden_states, planned_ids, topk_weights, router_logits, planned_segment, now.num_segments
        )
        start = time.perf_counter()
        result = plan(tokens) if plan else self.plan(tokens, self.exchange, taken)
        self.counters.plan_seconds += time.perf_counter() - start
        if left_alone is not None:
            result = result.with_rows(left_alone, topk_ids, topk_weights)
        if now.clipped is not None:
            now.clipped.add(half, self._logical(topk_ids), self._logical(result.topk_ids))
        if self._aside is None:
            self.count_plan(result)
        else:
            self._aside.append(result)
        if self.recorder is not None:
            recorded = result if left_alone is None else self._with_load(result, topk_ids, left_alone)
            self._record(now, topk_ids, topk_weights, recorded, planned=True)
        return Planned(result.topk_ids, result.topk_weights, segment, result, left_alone)

    def _makes_room(self, now: batch.Batch) -> bool:
        """Whether others make room for rows left alone. Replicas are chosen and bounded as if these were not there."""
        return now.makes_room and self.plan.places is None

    def count_dispatch(self, now: batch.Batch, half: int | None = None) -> None:
        """One dispatch of the batch `now`, or of one of its halves."""
        skip = now.skip_of(self.layer_id)
        self.counters.dispatches += 1
        if skip:
            self.counters.skipped[skip] += 1
        if self.layer_id in now.gain and not half:  # a batch's halves share its gain
            self.counters.expected_gain[skip or "planned"] += now.gain[self.layer_id]

    def count_plan(self, result: PlanResult) -> None:
        """One plan of the pass that is running. `result` is kept: nobody may write to it afterwards."""
        self.counters.add_plan(self.layer_id, result, by_expert=math.isinf(self.plan.config.gamma))
        if self.acting is not None:
            self.acting.add(self.layer_id, self.plan, result)

    def count_bounded(self) -> None:
        """A dispatch whose rows were not counted on the host."""
        self.counters.bounded += self._aside is None

    @contextmanager
    def uncounted(self) -> Iterator[list[PlanResult]]:
        """Within, dispatches are planned and not counted: the caller does so, and finds their plans in the list."""
        self._aside = []
        try:
            yield self._aside
        finally:
            self._aside = None

    def _record(
        self, now: batch.Batch, topk_ids: Tensor, topk_weights: Tensor, result: PlanResult, *, planned: bool
    ) -> None:
        assert self.recorder is not None
        gain, places = now.gain.get(self.layer_id, 0), self.plan.places
        given = self.layer_id, self.plan.num_ranks, topk_ids, topk_weights, result
        self.recorder.add(*given, planned=planned, gain=gain, places=places)

    def _as_routed(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, segment: Tensor, num_segments: int
    ) -> PlanResult:
        """For a trace, of a layer left alone: everything is kept, no bound, sums of this rank alone."""
        weight = self.plan.weight(hidden_states, segment, num_segments)
        own = self.plan.histogram(topk_ids, topk_weights, weight, segment)[: self.plan.cells]
        text, experts = (segment < 0).unsqueeze(1), self._logical(topk_ids)
        by_modality = torch.stack([experts.masked_fill(text, -1), experts.masked_fill(~text, -1)])
        counts = own.new_zeros(3, self.plan.num_experts, 2)
        counts[0] = stats.rows_of(by_modality, self.plan.num_experts).t()
        cut = own.new_tensor([[-1, 0, 0, 2**31 - 1]])
        return PlanResult(topk_ids, topk_weights, weight, own, own, cut, counts)

    def _with_load(self, result: PlanResult, topk_ids: Tensor, left_alone: Tensor) -> PlanResult:
        """For a trace, which shows each rank's whole load: rows left alone count as text that was kept."""
        experts = self._logical(topk_ids).masked_fill(~left_alone.unsqueeze(1), -1)
        rows = stats.rows_of(experts, self.plan.num_experts)
        counts = result.counts.clone()
        counts[0, :, 1] += rows.to(counts.dtype)
        return result._replace(counts=counts)

    def _logical(self, topk_ids: Tensor) -> Tensor:
        places = self.plan.places
        return topk_ids if places is None else places.logical_on(topk_ids.device)[topk_ids.long()]

    @property
    def exchange(self) -> PeerAllReduce | Callable[[Tensor], object]:
        """What a plan sums its histogram by."""
        return self.peers or self.all_reduce

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums over the EP group, in place."""
        if self.peers is not None and self.peers.takes(tensor):
            self.peers(tensor)
        else:
            dist.all_reduce(tensor, group=self.group)

    def recount(self, topk_ids: Tensor, planned: Planned) -> Tensor:
        """[S, E] rows of this rank, from the ids before and after (see `stats.recount`)."""
        weight = planned.result.weight if planned.result else None
        segment = planned.segment if batch.current().measured else None
        sent, left_alone, places = planned.topk_ids, planned.left_alone, self.plan.places
        logical = None if places is None else places.logical_on(topk_ids.device)
        return stats.recount(self.plan.num_physical, topk_ids, sent, weight, segment, left_alone, logical)

    def prove(self, planned: Planned, own: Tensor, group: Tensor) -> None:
        """Counts the group's rows and holds them against the bounds. own, group: [S, E] recounts."""
        if planned.segment is not None:
            cut = planned.result.cut if planned.result else None
            left_alone = planned.left_alone is not None
            config, num_ranks, places = self.plan.config, self.plan.num_ranks, self.plan.places
            on_ranks, room = None if places is None else places.on_ranks, self._makes_room(batch.current())
            counted = stats.Recount(config, self.layer_id, num_ranks, own, group, cut, left_alone, on_ranks, room)
            self.counters.add_recount(counted)

    def measure(self, topk_ids: Tensor, planned: Planned) -> None:
        """Recounts and proves, with an all-reduce, where this pass is measured (all ranks agree)."""
        if planned.segment is None or self.observe(topk_ids, planned.segment) or not batch.current().measured:
            return
        own = self.recount(topk_ids, planned)
        group = own.clone()
        self.all_reduce(group)
        self.prove(planned, own, group)

    def measure_gathered(self, topk_ids: Tensor, planned: Planned, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """Recounts and proves every pass by an exchange that the dispatch needs anyway: `gather` makes of this rank's
        recount [S, E] those of all ranks [R, S, E], which are returned.
        """
        if planned.segment is not None and (seen := self._beside()) is not None:
            seen.add_tokens(self.group, self.plan.config, topk_ids, planned.segment)
        own = self.recount(topk_ids, planned)
        rows = gather(own)
        self.prove(planned, own, rows.sum(dim=0))
        return rows

    def observe(self, topk_ids: Tensor, segment: Tensor) -> bool:
        """Counts a dispatch of ids [T, K] beside its pass, where --macs-preset observe looks at it; False elsewhere."""
        seen = self._beside()
        if seen is not None:
            seen.add_tokens(self.group, self.plan.config, topk_ids, segment)
            seen.add(self.layer_id, self.plan.num_ranks, stats.rows_of(topk_ids, self.plan.num_physical))
        return seen is not None

    def _beside(self) -> Observed | None:
        """What sees this pass beside it, as on all ranks."""
        return self.observed if self.plan.config.observes and batch.current().measured else None

    def plans(self) -> bool:
        """Whether this layer is planned in the batch that is running."""
        return not batch.current().skip_of(self.layer_id)

    def expected_rows(self, top_k: int) -> int | None:
        """Rows that an expert has to expect of the batch that is running: the group's mean, never more than gamma times
        it. None where the batch is not planned or cannot be known (halves).
        """
        now, config = batch.current(), self.plan.config
        if not self.plans() or now.halves or not now.group_tokens:
            return None
        return max(1, math.ceil(min(config.gamma, 1.0) * now.group_tokens * top_k / self.plan.num_physical))

    def segment(self, now: batch.Batch, half: int | None, topk_ids: Tensor) -> Tensor:
        """[T] i32 of the rows of topk_ids [T, K]."""
        segment, fits = now.segment_of_rows(topk_ids.shape[0], half, self.attn_tp, topk_ids.device)
        self.counters.misaligned += not fits
        return segment

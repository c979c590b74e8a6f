"""Planning in front of a dispatch (any device), and the CPU dispatcher: a real all-to-all over torch.distributed
(gloo), idle ranks and empty rows included.

One row travels per assignment, to the rank that holds its expert, as in DeepEP's low-latency mode. Combine brings the
experts' outputs back and adds them up under the gate weights at the source.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.peer_all_reduce import PeerAllReduce
from ..observe import stats
from ..observe.recorder import Recorder
from ..plan import batch
from ..plan.plan import Plan, PlanResult
from .acting import Acting


@dataclass(frozen=True)
class _Sent:
    """What combine needs of the dispatch before it: where each row came from, and the splits."""

    slots: Tensor  # [S] flat (token, slot) of each row sent, grouped by rank
    send_rows: list[int]  # [R]
    recv_rows: list[int]  # [R]
    topk_weights: Tensor  # [T, K]


class AllToAll:
    """Sends assignments to the ranks of their experts and their outputs back. Collective.

    Args:
        group: process group of R ranks whose order is the EP rank order.
        num_experts: E, a multiple of R; rank r holds experts [r * E / R, (r + 1) * E / R).
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.num_experts = num_experts
        self.num_local = num_experts // self.num_ranks
        self._sent: _Sent | None = None

    def gather_counts(self, own: Tensor) -> Tensor:
        """[S, E] of each rank -> [R, S, E]."""
        gathered = own.new_empty((self.num_ranks, *own.shape))
        dist.all_gather(list(gathered.unbind()), own, group=self.group)
        return gathered

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows for this rank's experts.

        Args:
            hidden_states: [T, H]; topk_ids: [T, K], -1 = nothing to send; topk_weights: [T, K].
            rows: [R, E], how many rows each source sends to each expert.
        Returns:
            [N, H] rows by (source, expert order of arrival) and [N] i64 local experts.
        """
        flat = topk_ids.reshape(-1).long()
        slots = torch.argsort(flat, stable=True)[int((flat < 0).sum()) :]  # by expert, so by rank; -1 first, cut off
        matrix = rows.unflatten(1, (self.num_ranks, self.num_local)).sum(dim=2)  # [source, destination]
        sent = _Sent(slots, matrix[self.rank].tolist(), matrix[:, self.rank].tolist(), topk_weights)
        outgoing = hidden_states[slots // max(topk_ids.shape[1], 1)].contiguous()
        received = hidden_states.new_empty((sum(sent.recv_rows), hidden_states.shape[1]))
        dist.all_to_all_single(received, outgoing, sent.recv_rows, sent.send_rows, group=self.group)
        # Each source sends in expert order, so the counts alone say which expert every row is for.
        mine = rows[:, self.rank * self.num_local : (self.rank + 1) * self.num_local]
        local = torch.arange(self.num_local).repeat(self.num_ranks)
        self._sent = sent
        return received, torch.repeat_interleave(local, mine.reshape(-1))

    def remote_rows(self) -> int:
        """Rows of the dispatch under way that went to other ranks; combine brings as many back."""
        return sum(self._sent.send_rows) - self._sent.send_rows[self.rank]

    def combine(self, outputs: Tensor) -> Tensor:
        """[N, H] expert outputs in the order of `dispatch` -> [T, H] sums weighted by the gate, in f32, as outputs'
        dtype.
        """
        sent, self._sent = self._sent, None
        back = outputs.new_empty((sum(sent.send_rows), outputs.shape[1]))
        dist.all_to_all_single(back, outputs.contiguous(), sent.send_rows, sent.recv_rows, group=self.group)
        tokens, top_k = sent.topk_weights.shape
        expanded = torch.zeros((tokens * top_k, outputs.shape[1]), dtype=torch.float32)
        expanded[sent.slots] = back.float() * sent.topk_weights.reshape(-1)[sent.slots].float().unsqueeze(1)
        return expanded.view(tokens, top_k, outputs.shape[1]).sum(dim=1).to(outputs.dtype)


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
    ) -> None:
        self.layer_id = layer_id
        self.plan = plan
        self.group = group
        self.counters = counters
        self.attn_tp = attn_tp
        self.recorder = recorder
        self.peers = peers
        self.acting = acting

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        router_logits: Tensor | None,
        half: int | None = None,
        plan: Callable[..., PlanResult] | None = None,
    ) -> Planned:
        """Shapes as in `Plan.__call__`; every rank calls it for every dispatch, T = 0 included.

        half: 0 or 1 under two-batch overlap, which dispatches the halves of a batch one by one.
        plan: in place of the layer's own, with its arguments but for the all-reduce, where the dispatch itself plans.
        """
        now = batch.current()
        skip = now.skip_of(self.layer_id)
        self.counters.dispatches += 1
        if skip:
            self.counters.skipped[skip] += 1
            if skip not in ("off", batch.NO_GAIN):
                return Planned(topk_ids, topk_weights)
        if self.layer_id in now.gain and not half:  # a batch's halves share its gain
            self.counters.expected_gain[skip or "planned"] += now.gain[self.layer_id]
        segment = self._segment(now, half, topk_ids)
        left_alone, planned_segment = now.left_alone_of(segment)
        if skip:
            if skip == batch.NO_GAIN and self.recorder is not None:
                routed = self._as_routed(hidden_states, topk_ids, topk_weights, planned_segment, now.num_segments)
                self._record(now, topk_ids, topk_weights, routed, planned=False)
            return Planned(topk_ids, topk_weights, segment, None, left_alone)
        planned_ids = topk_ids if left_alone is None else topk_ids.masked_fill(left_alone.unsqueeze(1), -1)
        given = hidden_states, planned_ids, topk_weights, router_logits, planned_segment, now.num_segments
        start = time.perf_counter()
        result = plan(*given) if plan else self.plan(*given, self.exchange)
        self.counters.plan_seconds += time.perf_counter() - start
        if left_alone is not None:
            result = result.with_rows(left_alone, topk_ids, topk_weights)
        self.counters.add_plan(self.layer_id, result, by_expert=math.isinf(self.plan.config.gamma))
        if self.acting is not None:
            self.acting.add(self.layer_id, self.plan, result)
        if self.recorder is not None:
            recorded = result if left_alone is None else self._with_load(result, topk_ids, left_alone)
            self._record(now, topk_ids, topk_weights, recorded, planned=True)
        return Planned(result.topk_ids, result.topk_weights, segment, result, left_alone)

    def _record(
        self, now: batch.Batch, topk_ids: Tensor, topk_weights: Tensor, result: PlanResult, *, planned: bool
    ) -> None:
        about = {"planned": planned, "gain": now.gain.get(self.layer_id, 0)}
        self.recorder.add(self.layer_id, self.plan.num_ranks, topk_ids, topk_weights, result, **about)

    def _as_routed(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, segment: Tensor, num_segments: int
    ) -> PlanResult:
        """For a trace, of a layer left alone: everything is kept, no bound, sums of this rank alone."""
        weight = self.plan.weight(hidden_states, segment, num_segments)
        own = self.plan.histogram(topk_ids, topk_weights, weight, segment)
        text = (segment < 0).unsqueeze(1)
        by_modality = torch.stack([topk_ids.masked_fill(text, -1), topk_ids.masked_fill(~text, -1)])
        counts = own.new_zeros(3, self.plan.num_experts, 2)
        counts[0] = stats.rows_of(by_modality, self.plan.num_experts).t()
        cut = own.new_tensor([[-1, 0, 0, 2**31 - 1]])
        return PlanResult(topk_ids, topk_weights, weight, own, own, cut, counts)

    def _with_load(self, result: PlanResult, topk_ids: Tensor, left_alone: Tensor) -> PlanResult:
        """For a trace, which shows each rank's whole load: rows left alone count as text that was kept."""
        rows = stats.rows_of(topk_ids.masked_fill(~left_alone.unsqueeze(1), -1), self.plan.num_experts)
        counts = result.counts.clone()
        counts[0, :, 1] += rows.to(counts.dtype)
        return result._replace(counts=counts)

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
        sent, left_alone = planned.topk_ids, planned.left_alone
        return stats.recount(self.plan.num_experts, topk_ids, sent, weight, segment, left_alone)

    def prove(self, planned: Planned, own: Tensor, group: Tensor) -> None:
        """Counts the group's rows and holds them against the bounds. own, group: [S, E] recounts."""
        if planned.segment is not None:
            cut = planned.result.cut if planned.result else None
            left_alone = planned.left_alone is not None
            config, num_ranks = self.plan.config, self.plan.num_ranks
            self.counters.add_recount(stats.Recount(config, self.layer_id, num_ranks, own, group, cut, left_alone))

    def measure(self, topk_ids: Tensor, planned: Planned) -> None:
        """Recounts and proves, with an all-reduce, where this pass is measured (all ranks agree)."""
        if batch.current().measured and planned.segment is not None:
            own = self.recount(topk_ids, planned)
            group = own.clone()
            self.all_reduce(group)
            self.prove(planned, own, group)

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
        return max(1, math.ceil(min(config.gamma, 1.0) * now.group_tokens * top_k / self.plan.num_experts))

    def _segment(self, now: batch.Batch, half: int | None, topk_ids: Tensor) -> Tensor:
        segment, fits = now.segment_of_rows(topk_ids.shape[0], half, self.attn_tp, topk_ids.device)
        self.counters.misaligned += not fits
        return segment


class MacsDispatcher:
    """One MoE layer's dispatch under MACS on CPU: the planner, then the all-to-all."""

    def __init__(self, planner: LayerPlanner) -> None:
        self.planner = planner
        self.comm = AllToAll(planner.group, planner.plan.num_experts)

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, router_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Plans, proves and sends. Returns what `AllToAll.dispatch` returns."""
        planned = self.planner(hidden_states, topk_ids, topk_weights, router_logits)
        own = self.planner.recount(topk_ids, planned)
        rows = self.comm.gather_counts(own)  # [R, S, E]: the all-to-all's splits, and the proof
        self.planner.prove(planned, own, rows.sum(dim=0))
        received = self.comm.dispatch(hidden_states, planned.topk_ids, planned.topk_weights, rows[:, stats.AFTER])
        self.planner.counters.received_rows += received[0].shape[0]
        self.planner.counters.remote_rows += self.comm.remote_rows()
        return received

    def combine(self, outputs: Tensor) -> Tensor:
        """[N, H] expert outputs -> [T, H]."""
        return self.comm.combine(outputs)

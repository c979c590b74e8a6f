"""The dispatch on CPU: a real all-to-all over torch.distributed (gloo), idle ranks and empty rows included.

One row travels per assignment, to the rank that holds its expert, as in DeepEP's low-latency mode. Combine brings the
experts' outputs back and adds them up under the gate weights at the source.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe import stats
from .planner import LayerPlanner


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
        assert self._sent is not None, "no dispatch is under way"
        return sum(self._sent.send_rows) - self._sent.send_rows[self.rank]

    def combine(self, outputs: Tensor) -> Tensor:
        """[N, H] expert outputs in the order of `dispatch` -> [T, H] sums weighted by the gate, in f32, as outputs'
        dtype.
        """
        sent, self._sent = self._sent, None
        assert sent is not None, "no dispatch is under way"
        back = outputs.new_empty((sum(sent.send_rows), outputs.shape[1]))
        dist.all_to_all_single(back, outputs.contiguous(), sent.send_rows, sent.recv_rows, group=self.group)
        tokens, top_k = sent.topk_weights.shape
        expanded = torch.zeros((tokens * top_k, outputs.shape[1]), dtype=torch.float32)
        expanded[sent.slots] = back.float() * sent.topk_weights.reshape(-1)[sent.slots].float().unsqueeze(1)
        return expanded.view(tokens, top_k, outputs.shape[1]).sum(dim=1).to(outputs.dtype)


class MacsDispatcher:
    """One MoE layer's dispatch under MACS on CPU: the planner, then the all-to-all."""

    def __init__(self, planner: LayerPlanner) -> None:
        self.planner = planner
        self.comm = AllToAll(planner.group, planner.plan.num_physical)

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, router_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Plans, proves and sends. Returns what `AllToAll.dispatch` returns."""
        planned = self.planner(hidden_states, topk_ids, topk_weights, router_logits)
        # [R, S, E]: the all-to-all's splits, and the proof
        rows = self.planner.measure_gathered(topk_ids, planned, self.comm.gather_counts)
        received = self.comm.dispatch(hidden_states, planned.topk_ids, planned.topk_weights, rows[:, stats.AFTER])
        self.planner.counters.received_rows += received[0].shape[0]
        self.planner.counters.remote_rows += self.comm.remote_rows()
        return received

    def combine(self, outputs: Tensor) -> Tensor:
        """[N, H] expert outputs -> [T, H]."""
        return self.comm.combine(outputs)

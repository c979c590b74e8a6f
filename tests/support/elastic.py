"""DeepEP's `ElasticBuffer` among threads of one process: its expanded layout, with and without a count on the host."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import torch
from torch import Tensor


class World:
    """What the ranks share. `received`: rows that each rank got in the last dispatch."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks, self.received = num_ranks, [0] * num_ranks
        self._barrier, self._given = threading.Barrier(num_ranks, timeout=60), [None] * num_ranks

    def exchange(self, rank: int, given: object) -> list:
        """What all ranks have given, when they have."""
        self._given[rank] = given
        self._barrier.wait()
        everything = list(self._given)
        self._barrier.wait()
        return everything


class ElasticBuffer:
    """One rank's. Rows nobody wrote hold NaN. calls: `do_cpu_sync` of each dispatch."""

    def __init__(self, world: World, rank: int, num_max_tokens_per_rank: int) -> None:
        self.world, self.rank, self.tokens, self.calls = world, rank, num_max_tokens_per_rank, []

    def dispatch(
        self, x: Tensor, *, topk_idx: Tensor, topk_weights: Tensor, num_experts: int, expert_alignment: int, **given
    ) -> tuple:
        assert given["do_expand"] and given["num_max_tokens_per_rank"] == self.tokens >= len(x) == len(topk_idx)
        assert len(x) or not given["do_cpu_sync"], "an idle rank notifies nobody of its count"
        self.calls.append(given["do_cpu_sync"])
        local = num_experts // self.world.num_ranks
        rows, ends, sources, end = [], [], [], 0
        all_ranks = self.world.exchange(self.rank, (x, topk_idx, topk_weights))
        for expert in range(self.rank * local, (self.rank + 1) * local):
            row = -(-end // expert_alignment) * expert_alignment
            for rank, (tokens, ids, weights) in enumerate(all_ranks):
                for token, slot in (ids == expert).nonzero().tolist():
                    rows.append((row, tokens[token], weights[token, slot]))
                    sources.append((rank, token, row))
                    row += 1
            end = row
            ends.append(end)
        self.world.received[self.rank] = len(rows)
        counted = -(-end // expert_alignment) * expert_alignment
        worst = self.world.num_ranks * self.tokens * min(topk_idx.shape[1], local) + local * (expert_alignment - 1)
        room = counted if given["do_cpu_sync"] else -(-worst // expert_alignment) * expert_alignment
        received, gates = x.new_full((room, x.shape[1]), torch.nan), topk_weights.new_full((room,), torch.nan)
        for row, token, gate in rows:
            received[row], gates[row] = token, gate
        psum = torch.tensor(ends, dtype=torch.int32)
        handle = SimpleNamespace(psum_num_recv_tokens_per_expert=psum, sources=sources, sent=len(x))
        return received, None, gates, handle, SimpleNamespace(event=None)

    def combine(self, x: Tensor, *, handle: SimpleNamespace, topk_weights: None) -> tuple:
        assert topk_weights is None, "weighted by the runner"
        own = x.new_zeros(handle.sent, x.shape[1], dtype=torch.float32)
        for outputs, sources in self.world.exchange(self.rank, (x, handle.sources)):
            for rank, token, row in sources:
                if rank == self.rank:
                    own[token] += outputs[row].float()
        return own.to(x.dtype), None, SimpleNamespace(event=None)

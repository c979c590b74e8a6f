"""Plans of a group whose experts are replicated."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from reference import cases, replica_cases
from reference.replica_cases import ReplicaGroup
from sglang_macs.config import MacsConfig
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan, PlanResult

# physical_to_logical, ranks, tokens of the first ranks (the others have none), what the options are besides.
PLACED = {
    "two_ranks_linear": (list(range(8)), 2, (40, 33), {"gamma": 1.0}),
    "two_ranks_moved": ([3, 1, 0, 2, 7, 4, 6, 5], 2, (40, 33), {"gamma": 0.5, "protect_text": False}),
    "one_copy": ([0, 1, 2, 3, 4, 5, 6, 0], 4, (30, 0, 21, 7), {"gamma": 1.0, "reroute": "none"}),
    "copies_beside_each_other": ([0, 0, 1, 2, 3, 1, 0, 4], 2, (30, 41), {"gamma": 0.5}),
    "many_copies": ([0, 1, 2, 0, 1, 3, 4, 0, 5, 1, 2, 0], 4, (50, 21, 0, 9), {"gamma": 1.0, "reroute_rounds": 3}),
    "many_copies_half": ([0, 1, 2, 0, 1, 3, 4, 0, 5, 1, 2, 0], 4, (50, 21, 0, 9), {"gamma": 0.5}),
    "many_copies_half_unprotected": (
        [0, 1, 2, 0, 1, 3, 4, 0, 5, 1, 2, 0], 4, (50, 21, 0, 9),
        {"gamma": 0.5, "protect_text": False, "reroute": "none"},
    ),
    "everywhere": ([x for rank in range(8) for x in (0, 2 * rank + 1, 2 * rank + 2)], 8, (60, 5), {"gamma": 0.9}),
    "everywhere_unbounded": (
        [x for rank in range(8) for x in (0, 2 * rank + 1, 2 * rank + 2)], 8, (60, 5), {"gamma": math.inf},
    ),
    "eight_ranks": ([*range(20), 0, 0, 1, 2], 8, (20, 0, 16, 3, 40, 1), {"gamma": 1.0}),
    "one_source_alike": ([0, 1, 2, 3, 4, 5, 0, 1], 4, (0, 60), {"gamma": 0.9}),
    "no_tokens": ([0, 1, 2, 3, 4, 5, 0, 1], 4, (), {"gamma": 1.0}),
}  # fmt: skip


def placed(name: str, dtype: torch.dtype) -> tuple[ReplicaGroup, MacsConfig]:
    """A case: skewed loads, some slots empty. Entropies matter to nothing, so that weights are the same bits."""
    mapped, num_ranks, tokens, options = PLACED[name]
    gen, num_experts, top_k = cases.generator(11), max(mapped) + 1, 2
    parts = 2 - num_experts % 2
    shape = {"num_experts": num_experts, "top_k": top_k, "num_ranks": parts, "empty_share": 0.1}
    shape["imbalance"] = 1 + 0.8 * (cases.most_imbalance(num_experts, parts, top_k) - 1)
    shape["ties"] = name.endswith("alike")
    counts = [*tokens, *[0] * (num_ranks - len(tokens))]
    batches = [replica_cases.with_copies(cases.batch(gen, num_tokens=n, **shape), mapped, gen) for n in counts]
    batches = [replace(b, topk_ids=b.topk_ids.to(dtype)) for b in batches]
    modality = torch.zeros(num_experts, dtype=torch.int8)
    config = MacsConfig.from_preset("rank", importance="gate", rho=0.0, **options)
    return ReplicaGroup(cases.Group(batches, num_experts, num_ranks, modality), mapped), config


def plans(group: ReplicaGroup, config: MacsConfig) -> list[Plan]:
    """One for each rank: their tables differ in whose they are."""
    mapped, num_experts, num_ranks = group.placed
    given = config, num_experts, num_ranks, group.group.modality, group.group.routing
    return [Plan(*given, Places(num_experts, len(mapped), num_ranks, rank, mapped)) for rank in range(num_ranks)]


def exchanged(group: ReplicaGroup, of_rank: list[Plan]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(weights of each rank, the sum of what they exchange)."""
    weights, own = [], []
    for plan, b in zip(of_rank, group.group.batches, strict=True):
        weights.append(plan.weight(b.hidden_states, b.segment, b.num_segments))
        own.append(plan.histogram(b.topk_ids, b.topk_weights, weights[-1], b.segment))
    return weights, torch.stack(own).sum(0, dtype=torch.int32)


def assert_alike(got: PlanResult, want: PlanResult) -> None:
    """Integers to the bit; weights that were re-routed by another exponential. `want`: on the CPU."""
    for name, mine, theirs in zip(got._fields, got, want, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-7)
        else:
            assert mine.dtype == theirs.dtype and torch.equal(mine.cpu(), theirs), name

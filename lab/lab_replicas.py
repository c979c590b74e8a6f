"""Copies of experts in the comparison: another copy first, then the clip, at the same bound on the fullest rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lab.lab_methods import Inputs, Method, Outcome, WithPlan, _clock
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens
from sglang_macs.simulate import replicas

SHARES = (0, 4, 2)  # of as many experts as there are, one in so many has a copy; 0: experts are moved alone


@dataclass
class WithReplicas(WithPlan):
    """`WithPlan` where experts lie as `placements` says: [P] logical expert of each physical one, by layer."""

    placements: dict[int, list[int]] = field(default_factory=dict)

    def __call__(self, given: Inputs, bound: float) -> Outcome:
        start, mapped = _clock(given.ids.device), self.placements[given.layer]
        plans = [self.plan_of(given, bound, rank) for rank in range(len(given.layout.sizes))]
        places = plans[0].places
        first = torch.tensor([mapped.index(expert) for expert in range(given.num_experts)], device=given.ids.device)
        physical, weights = self.planned(plans, given, first[given.ids])
        seconds = _clock(given.ids.device) - start
        ranks = given.layout.ranks
        width = len(mapped) // ranks
        rows = torch.bincount(physical[physical >= 0] // width, minlength=ranks)
        return Outcome(places.logical_on(physical.device)[physical], weights, seconds, rows)

    def plan_of(self, given: Inputs, gamma: float, rank: int) -> Plan:
        mapped = self.placements[given.layer]
        ranks = given.layout.ranks
        places = Places(given.num_experts, len(mapped), ranks, rank, mapped)
        modality = self.modality.get(given.layer)
        return Plan(self.config(gamma), given.num_experts, ranks, modality, given.router, places)

    def planned(self, plans: list[Plan], given: Inputs, physical: Tensor) -> tuple[Tensor, Tensor]:
        """ids, weights [P, K] of all ranks. Each plans twice: what it exchanges first, then with everybody's."""
        layout = given.layout
        parts = [x.split(layout.sizes) for x in (given.hidden, physical, given.weights, given.logits, layout.segment)]
        ranks = [RoutedTokens(*tokens, layout.num_segments) for tokens in zip(*parts, strict=True)]
        exchanged: list[Tensor] = []
        for plan, tokens in zip(plans, ranks, strict=True):
            plan(tokens, lambda own: exchanged.append(own.clone()))
        group = torch.stack(exchanged).sum(0, dtype=torch.int32)
        results = [plan(tokens, lambda own: own.copy_(group)) for plan, tokens in zip(plans, ranks, strict=True)]
        return torch.cat([r.topk_ids for r in results]), torch.cat([r.topk_weights for r in results])


def placements(rows: dict[int, Tensor], redundant: int, ranks: int) -> dict[int, list[int]]:
    """By layer, from the rows [E] of each expert in other batches."""
    return {
        layer: replicas.placement(loads.double().numpy(), len(loads) + redundant, ranks).tolist()
        for layer, loads in rows.items()
    }


def methods(rows: dict[int, Tensor], modality: dict[int, Tensor], ranks: int) -> list[Method]:
    """The default where experts lie linearly, and where they are placed by `rows`, without and with copies."""
    made = [Method("gate", WithPlan({}, modality))]
    experts = len(next(iter(rows.values())))
    for share in SHARES:
        redundant = experts // share if share else 0
        if redundant % ranks:
            continue  # as many experts on each rank
        placed = WithReplicas({}, modality, placements=placements(rows, redundant, ranks))
        name = f"gate, {redundant} copies" if redundant else "gate, placed"
        made.append(Method(name, placed, "another copy, then clip" if redundant else "", acts_above_bound_only=False))
    return made

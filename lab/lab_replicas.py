"""Copies of experts in the comparison: another copy first, then the clip, at the same bound on the fullest rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from lab_judge import RANKS
from lab_methods import Inputs, Method, Outcome, WithPlan, _clock
from torch import Tensor

from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.routing import Routing
from sglang_macs.plan.tokens import RoutedTokens
from sglang_macs.simulate import replicas

REDUNDANT = (0, 8, 16)  # 0: experts are moved, and none has a copy


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
        width = len(mapped) // RANKS
        rows = torch.bincount(physical[physical >= 0] // width, minlength=RANKS)
        return Outcome(places.logical_on(physical.device)[physical], weights, seconds, rows)

    def plan_of(self, given: Inputs, gamma: float, rank: int) -> Plan:
        mapped = self.placements[given.layer]
        places = Places(given.num_experts, len(mapped), RANKS, rank, mapped)
        modality, routing = self.modality.get(given.layer), Routing(self.scoring)
        return Plan(self.config(gamma), given.num_experts, RANKS, modality, routing, places)

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


def placements(rows: Tensor, redundant: int) -> dict[int, list[int]]:
    """By layer, from the rows [layers, E] of each expert in other batches."""
    physical = rows.shape[1] + redundant
    return {i: replicas.placement(layer.numpy(), physical, RANKS).tolist() for i, layer in enumerate(rows.double())}


def methods(rows: Tensor, modality: dict[int, Tensor], scoring: str) -> list[Method]:
    """The default where experts lie linearly, and where they are placed by `rows`, without and with copies."""
    made = [Method("gate", WithPlan({}, modality, scoring=scoring))]
    for redundant in REDUNDANT:
        placed = WithReplicas({}, modality, scoring=scoring, placements=placements(rows, redundant))
        name = f"gate, {redundant} copies" if redundant else "gate, placed"
        made.append(Method(name, placed, "another copy, then clip" if redundant else "", acts_above_bound_only=False))
    return made

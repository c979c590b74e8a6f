"""Plans of a group of ranks, and any options for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from reference import cases
from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan

PRESETS = ("paper", "rank", "cai")


@dataclass(frozen=True)
class Outcome:
    """One rank's plan, beside the batch it was made for."""

    batch: cases.Batch
    weight: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    shift: torch.Tensor
    cut: torch.Tensor

    @property
    def assigned(self) -> torch.Tensor:
        """Slots [T, K] that held an assignment."""
        return self.batch.topk_ids >= 0

    @property
    def kept(self) -> torch.Tensor:
        """Slots [T, K] whose original stays; a re-route never goes where an original was."""
        return self.assigned & (self.ids == self.batch.topk_ids)

    @property
    def moved(self) -> torch.Tensor:
        """Slots [T, K] that hold a re-route."""
        return self.assigned & (self.ids >= 0) & ~self.kept

    @property
    def visual(self) -> torch.Tensor:
        """Slots [T, K] of visual tokens."""
        return (self.batch.segment >= 0)[:, None].expand_as(self.ids)


def make_plan(group: cases.Group, config: MacsConfig) -> Plan:
    """The product's plan for this group."""
    return Plan(config, group.num_experts, group.num_ranks, group.modality, group.routing)


def run(group: cases.Group, config: MacsConfig, weights: list[torch.Tensor] | None = None) -> list[Outcome]:
    """The plan of every rank of the group, stage by stage in one process."""
    plan = make_plan(group, config)
    if weights is None:
        weights = [plan.weight(b.hidden_states, b.segment, b.num_segments) for b in group.batches]
    inputs = [(b.topk_ids, b.topk_weights, w, b.segment) for b, w in zip(group.batches, weights, strict=True)]
    own = [plan.histogram(*i) for i in inputs]
    total = torch.stack(own).sum(0, dtype=torch.int32)
    outcomes = []
    for b, w, i, histogram in zip(group.batches, weights, inputs, own, strict=True):
        cut = plan.threshold(histogram, histogram if config.exchange == "local" else total)
        outcomes.append(Outcome(b, w, *plan.apply(*i, b.router_logits, *cut), *cut))
    return outcomes


def configs(**fixed: Any) -> st.SearchStrategy[MacsConfig]:
    """A preset as it is, or with everything turned over by hand."""
    by_hand = st.builds(lambda options: MacsConfig.from_preset("rank", **(options | fixed)), cases.switches())
    preset = st.builds(
        lambda name, gamma: MacsConfig.from_preset(name, **({"gamma": gamma} | fixed)),
        st.sampled_from(PRESETS),
        st.sampled_from([1.05, 1.0, 1.2, 0.9, 0.5]),
    )
    return st.one_of(preset, by_hand)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit; floats compare as the integers they are stored as."""
    if a.dtype != b.dtype:
        return False
    return torch.equal(a.view(torch.int32), b.view(torch.int32)) if a.dtype == torch.float32 else torch.equal(a, b)


def is_identity(o: Outcome) -> bool:
    """Whether the plan changed nothing at all."""
    return same_bits(o.ids, o.batch.topk_ids) and same_bits(o.weights, o.batch.topk_weights)

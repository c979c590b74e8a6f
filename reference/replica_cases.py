"""Groups of ranks whose experts have replicas: any placement, and physical ids as SGLang might have chosen them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from sglang_macs.choices import SCORINGS
from sglang_macs.config import MacsConfig

from . import cases, oracle


@dataclass(frozen=True)
class ReplicaGroup:
    """As `cases.Group`, with physical ids; physical_to_logical [P]."""

    group: cases.Group
    physical_to_logical: list[int]

    def logical(self, ids: torch.Tensor) -> torch.Tensor:
        """Logical ids of physical ones, -1 of -1."""
        return torch.tensor([*self.physical_to_logical, -1])[ids]

    def oracle_inputs(self, weights: list[torch.Tensor]) -> list[oracle.RankInput]:
        return [oracle_input(self.group, b, w) for b, w in zip(self.group.batches, weights, strict=True)]

    @property
    def placed(self) -> tuple[list[int], int, int]:
        """What a placement is made from."""
        return self.physical_to_logical, self.group.num_experts, self.group.num_ranks


def oracle_input(group: cases.Group, b: cases.Batch, weight: torch.Tensor) -> oracle.RankInput:
    """A batch as the oracle takes it."""
    routed = (t.tolist() for t in (b.topk_ids, b.topk_weights, weight, b.segment, b.router_logits))
    selection = group.selection(b)
    return oracle.RankInput(*routed, None if selection is None else selection.tolist())


def placement(gen: torch.Generator, num_experts: int, num_physical: int) -> list[int]:
    """Every expert at least once, the rest of the copies on few experts; in any order."""
    copies = torch.randint(0, max(1, num_experts // 2), (num_physical - num_experts,), generator=gen)
    mapped = torch.cat([torch.arange(num_experts), copies])
    return mapped[torch.randperm(num_physical, generator=gen)].tolist()


def with_copies(b: cases.Batch, physical_to_logical: list[int], gen: torch.Generator) -> cases.Batch:
    """The batch with each logical id replaced by one of its physical ids, drawn anew for every assignment."""
    of_expert: dict[int, list[int]] = {}
    for p, e in enumerate(physical_to_logical):
        of_expert.setdefault(e, []).append(p)
    draws = torch.randint(0, 2**20, b.topk_ids.shape, generator=gen).tolist()
    ids = [
        [of_expert[e][draw % len(of_expert[e])] if e >= 0 else -1 for e, draw in zip(row, of_row, strict=True)]
        for row, of_row in zip(b.topk_ids.tolist(), draws, strict=True)
    ]
    return replace(b, topk_ids=torch.tensor(ids, dtype=torch.int64).view(b.topk_ids.shape))


@st.composite
def groups(draw: Callable[..., Any], redundant: bool = True) -> ReplicaGroup:
    """1 to 8 ranks of unequal, also no, tokens; experts need not divide among the ranks, their copies do."""
    num_ranks = draw(st.sampled_from([2, 4, 8, 1]))
    num_physical = num_ranks * draw(st.sampled_from([3, 2, 4]))
    num_redundant = draw(st.integers(0, num_physical // 2)) if redundant else 0  # 0: moved all the same
    num_experts = num_physical - num_redundant
    top_k = draw(st.integers(1, min(4, num_experts)))
    gen = cases.generator(draw(st.integers(0, 2**16)))
    parts = 2 - num_experts % 2
    heat = draw(st.sampled_from([0.6, 1.0, 0.0])) * (cases.most_imbalance(num_experts, parts, top_k) - 1)
    common = {
        "num_experts": num_experts, "top_k": top_k, "num_ranks": parts, "imbalance": 1 + heat,
        "ties": draw(st.booleans()), "empty_share": draw(st.sampled_from([0.0, 0.1, 0.4])),
        "scoring": draw(st.sampled_from(SCORINGS)), "renormalise": draw(st.booleans()),
    }  # fmt: skip
    mapped = placement(gen, num_experts, num_physical)
    sizes = [draw(st.sampled_from([16, 10, 7, 1, 0])) for _ in range(num_ranks)]
    shares = st.sampled_from([0.5, 0.8, 0.0, 1.0])
    batches = [
        cases.batch(gen, num_tokens=n, visual_share=draw(shares), num_images=draw(st.integers(1, 3)), **common)
        for n in sizes
    ]
    batches = [with_copies(b, mapped, gen) for b in batches]
    modality = torch.randint(-1, 2, (num_experts,), generator=gen).to(torch.int8)
    routing = draw(cases.routings(gen, num_experts, common["scoring"]))
    return ReplicaGroup(cases.Group(batches, num_experts, num_ranks, modality, routing), mapped)


def configs(**fixed: Any) -> st.SearchStrategy[MacsConfig]:
    """What replicas are planned under: scope rank, load rows, the group's exchange."""
    by_hand = (
        cases.switches()
        .map(lambda options: options | {"scope": "rank", "load": "rows"} | fixed)
        .map(lambda options: options | {"reroute": "none" if options["reroute"] == "local" else options["reroute"]})
    )
    return by_hand.map(lambda options: MacsConfig.from_preset("rank", **options))

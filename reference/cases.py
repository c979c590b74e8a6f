"""Generators of layer inputs: what the router hands over, with a chosen imbalance, visual share and awkwardness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

from sglang_macs.choices import SCORINGS
from sglang_macs.plan.routing import Routing
from sglang_macs.plan.tokens import RoutedTokens

PROPERTY = settings(deadline=None, max_examples=50, derandomize=True, print_blob=False)


@dataclass(frozen=True)
class Batch:
    """One rank's tokens: hidden_states [T, H], ids and gates [T, K], router_logits [T, E] f32, segment [T] i32."""

    hidden_states: torch.Tensor = field(repr=False)
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    router_logits: torch.Tensor = field(repr=False)
    segment: torch.Tensor
    num_segments: int

    @property
    def routed(self) -> RoutedTokens:
        """As a plan takes it."""
        return RoutedTokens(**vars(self))


@dataclass(frozen=True)
class Group:
    """The batches of all ranks of an EP group, and the model they belong to."""

    batches: list[Batch]
    num_experts: int
    num_ranks: int
    modality: torch.Tensor
    routing: Routing = field(default_factory=Routing)

    @property
    def scoring(self) -> str:
        return self.routing.scoring

    def selection(self, b: Batch) -> torch.Tensor | None:
        """What the candidates of a batch are ordered by, [T, E] f32, or None."""
        return self.routing.selection(b.router_logits.float())


def generator(seed: int) -> torch.Generator:
    """A seeded generator; nothing here touches the global one."""
    return torch.Generator().manual_seed(seed)


def expert_rows(num_experts: int, num_ranks: int, total: int, imbalance: float) -> list[int]:
    """Rows [E] adding up to `total`, of which rank 0 has `imbalance` times its mean; even within each part."""
    hot = num_experts // num_ranks
    hot_total = round(imbalance * total / num_ranks) if num_ranks > 1 else total
    rows = []
    for experts, part in ((hot, hot_total), (num_experts - hot, total - hot_total)):
        rows += [part // experts + (i < part % experts) for i in range(experts)]
    return rows


def most_imbalance(num_experts: int, num_ranks: int, top_k: int) -> float:
    """The largest `imbalance` that distinct experts within a token leave possible."""
    return min(num_ranks, num_experts / top_k)


def assign(rows: list[int], num_tokens: int, gen: torch.Generator) -> torch.Tensor:
    """topk_ids [T, sum(rows) / T] i64 with exactly `rows` of each expert and none twice in a token.

    Laid out expert by expert and wrapped every T, an expert with at most T rows meets no token twice.
    """
    if num_tokens == 0:
        raise ValueError("rows cannot be assigned to no tokens")
    if max(rows) > num_tokens or sum(rows) % num_tokens:
        raise ValueError(f"{rows} cannot be dealt to {num_tokens} tokens")
    ids = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows)).view(-1, num_tokens).T
    ids = ids[torch.randperm(num_tokens, generator=gen)]
    return ids.gather(1, torch.rand(ids.shape, generator=gen).argsort(1)).contiguous()


def segments(num_tokens: int, visual_share: float, num_images: int) -> torch.Tensor:
    """segment [T] i32: `num_images` runs of visual tokens in text, `round(visual_share T)` of them visual."""
    visual = round(visual_share * num_tokens)
    text = num_tokens - visual
    parts = []
    for i in range(num_images + 1):
        parts += [-1] * (text * (i + 1) // (num_images + 1) - text * i // (num_images + 1))
        if i < num_images:
            parts += [i] * (visual * (i + 1) // num_images - visual * i // num_images)
    return torch.tensor(parts, dtype=torch.int32)


def scores(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    """A router's scores [T, E] f64."""
    logits = logits.double()
    if scoring == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if scoring == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()


def gates(logits: torch.Tensor, ids: torch.Tensor, scoring: str, renormalise: bool) -> torch.Tensor:
    """topk_weights [T, K] f32 that a router with these logits [T, E] gives ids [T, K]; 0 where a slot is empty."""
    chosen = scores(logits, scoring).gather(1, ids.clamp(min=0)) * (ids >= 0)
    if renormalise:
        chosen = chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-300)
    return chosen.float()


def batch(
    gen: torch.Generator,
    *,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    num_ranks: int = 1,
    imbalance: float = 1.0,
    visual_share: float = 0.5,
    num_images: int = 2,
    empty_share: float = 0.0,
    ties: bool = False,
    scoring: str = "softmax",
    renormalise: bool = True,
    hidden_size: int = 16,
) -> Batch:
    """A batch whose rank 0 has `imbalance` times the mean rows; with `ties` nothing tells two tokens apart.

    Of all slots, `round(empty_share T K)` are emptied afterwards, wherever they fall.
    """
    rows = expert_rows(num_experts, num_ranks, num_tokens * top_k, imbalance)
    ids = assign(rows, num_tokens, gen) if num_tokens else torch.empty(0, top_k, dtype=torch.int64)
    logits = torch.randn(num_tokens, num_experts, generator=gen)
    logits = torch.zeros_like(logits) if ties else logits.scatter_add(1, ids, torch.full(ids.shape, 2.0))
    empty = torch.randperm(ids.numel(), generator=gen)[: round(empty_share * ids.numel())]
    ids.view(-1)[empty] = -1
    hidden = torch.randn(num_tokens, hidden_size, generator=gen)
    spread = 4 * torch.rand(num_tokens, 1, generator=gen)
    return Batch(
        hidden_states=torch.ones_like(hidden) if ties else hidden * spread,
        topk_ids=ids,
        topk_weights=gates(logits, ids, scoring, renormalise),
        router_logits=logits,
        segment=segments(num_tokens, visual_share, num_images),
        num_segments=num_images,
    )


def concat(batches: list[Batch]) -> Batch:
    """All tokens of several ranks on one, every segment still apart."""
    first, parts = 0, []
    for b in batches:
        parts.append(torch.where(b.segment >= 0, b.segment + first, b.segment))
        first += b.num_segments
    joined = {
        name: torch.cat([getattr(b, name) for b in batches])
        for name in ("hidden_states", "topk_ids", "topk_weights", "router_logits")
    }
    return Batch(**joined, segment=torch.cat(parts), num_segments=first)


def _usual(**changes: Any) -> dict[str, Any]:
    return {"num_tokens": 40, "num_experts": 16, "top_k": 4, "num_ranks": 4, "imbalance": 1.8} | changes


def routing(
    gen: torch.Generator, num_experts: int, scoring: str, *, biased: bool = False, groups: tuple[int, int] = (1, 1)
) -> Routing:
    """A router of `num_experts` experts; groups: how many there are, and how many a token chooses."""
    bias = 0.4 * torch.randn(num_experts, generator=gen) if biased else None
    return Routing(scoring, bias, *groups)


# One batch for every way in which a layer's input can be awkward; `num_ranks` is the one to plan for.
NAMED: dict[str, dict[str, Any]] = {
    "balanced": _usual(imbalance=1.0),
    "imbalanced": _usual(),
    "all_visual": _usual(visual_share=1.0),
    "all_text": _usual(visual_share=0.0),
    "empty_slots": _usual(empty_share=0.4),
    "ties_everywhere": _usual(ties=True),
    "hot_expert": _usual(num_ranks=16, imbalance=4.0),
    "no_tokens": _usual(num_tokens=0),
    "all_empty": _usual(empty_share=1.0),
    "top_1": _usual(top_k=1),
    "odd_experts": _usual(num_experts=18, num_ranks=3, top_k=5),
    "sigmoid": _usual(scoring="sigmoid", renormalise=False),
    "sqrtsoftplus": _usual(scoring="sqrtsoftplus"),
    "biased": _usual(scoring="sigmoid"),
    "grouped": _usual(),
    "biased_groups": _usual(scoring="sigmoid", renormalise=False),
    "prefill": _usual(num_tokens=1500, num_experts=64, top_k=8, num_ranks=8, num_images=5),
}


ROUTINGS: dict[str, dict[str, Any]] = {  # of `routing`, for those of NAMED whose router knows more than logits
    "biased": {"biased": True},
    "grouped": {"groups": (4, 2)},
    "biased_groups": {"biased": True, "groups": (4, 2)},
}


def named(name: str) -> Group:
    """The batch NAMED so, as the only one of its group."""
    shape = NAMED[name]
    one = batch(generator(len(name)), **shape)
    modality = (torch.arange(shape["num_experts"]) % 3 - 1).to(torch.int8)
    experts, scoring = shape["num_experts"], shape.get("scoring", "softmax")
    router = routing(generator(len(name)), experts, scoring, **ROUTINGS.get(name, {}))
    return Group([one], experts, shape["num_ranks"], modality, router)


def switches() -> st.SearchStrategy[dict[str, Any]]:
    """Every combination of the settings that histogram, threshold and apply take."""
    return st.fixed_dictionaries(
        {
            "scope": st.sampled_from(["expert", "rank"]),
            "load": st.sampled_from(["rows", "effective"]),
            "importance": st.sampled_from(["entropy", "gate", "entropy_gate"]),
            "reroute": st.sampled_from(["global", "local", "none"]),
            "protect_text": st.booleans(),
            "buckets": st.sampled_from([32, 64, 128, 256]),
            "reroute_rounds": st.integers(1, 3),
            "gamma": st.sampled_from([1.1, 1.0, 1.05, 1.5, 0.8, 0.3, 0.01]),
            "rho": st.sampled_from([0.0, 0.5, 1.9]),
            "alpha": st.sampled_from([0.0, 0.5, 1.0, 2.3]),
            "c_min": st.sampled_from([0.0, 1.0, 2.5]),
        }
    )


def routings(gen: torch.Generator, num_experts: int, scoring: str) -> st.SearchStrategy[Routing]:
    """Routers with that scoring: with and without a bias, with and without groups."""
    parts = [(n, k) for n in (2, 3, 4) if num_experts % n == 0 and num_experts >= 2 * n for k in range(n - 1, 0, -1)]
    kinds = [(groups, biased) for groups in ((1, 1), *parts) for biased in (True, False)]
    return st.sampled_from(kinds).map(lambda kind: routing(gen, num_experts, scoring, groups=kind[0], biased=kind[1]))


@st.composite
def groups(draw: Callable[..., Any], ranks: st.SearchStrategy[int] | None = None, all_ranks: bool = True) -> Group:
    """A group of 1 to 8 ranks with any mix of sizes; with `all_ranks` every rank brings its batch."""
    num_ranks = draw(ranks if ranks is not None else st.sampled_from([1, 2, 4, 8]))
    num_experts = num_ranks * draw(st.sampled_from([4, 3, 2, 1] if num_ranks > 2 else [8, 5, 3, 1]))
    top_k = draw(st.integers(1, min(6, num_experts)))
    scoring = draw(st.sampled_from(SCORINGS))
    heat = draw(st.sampled_from([0.6, 0.2, 1.0, 0.0])) * (most_imbalance(num_experts, num_ranks, top_k) - 1)
    common = {
        "num_experts": num_experts,
        "top_k": top_k,
        "num_ranks": num_ranks,
        "imbalance": 1 + heat,
        "ties": draw(st.booleans()),
        "empty_share": draw(st.sampled_from([0.0, 0.1, 0.4])),
        "scoring": scoring,
        "renormalise": draw(st.booleans()),
    }
    gen = generator(draw(st.integers(0, 2**16)))
    batches = [
        batch(
            gen,
            num_tokens=draw(st.sampled_from([16, 24, 7, 1, 0])),
            visual_share=draw(st.sampled_from([0.5, 0.8, 0.0, 1.0])),
            num_images=draw(st.integers(1, 3)),
            **common,
        )
        for _ in range(num_ranks if all_ranks else 1)
    ]
    modality = torch.randint(-1, 2, (num_experts,), generator=gen).to(torch.int8)
    return Group(batches, num_experts, num_ranks, modality, draw(routings(gen, num_experts, scoring)))

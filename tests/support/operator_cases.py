"""Operators by name with inputs and options of theirs, as tests of CPU, emulated machine and GPU call them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from reference import cases, oracle
from sglang_macs import ops
from tests.support import operators

HISTOGRAM = ("buckets", "load", "importance")
THRESHOLD = ("buckets", "scope", "load", "reroute", "protect_text", "gamma", "rho", "alpha", "c_min")
APPLY = ("buckets", "scope", "load", "importance", "reroute", "protect_text", "reroute_rounds")
USUAL = {
    "scope": "rank", "load": "rows", "importance": "entropy_gate", "reroute": "global", "protect_text": True,
    "buckets": 128, "reroute_rounds": 3, "gamma": 1.0, "rho": 0.5, "alpha": 1.0, "c_min": 0.0,
}  # fmt: skip


def pick(switches: dict[str, Any], names: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """The settings that one operator takes."""
    return {name: switches[name] for name in names} | more


def weight_of(b: cases.Batch, delta: float = 1.0) -> torch.Tensor:
    """Entropy weights [T] f32 by the oracle, rounded: the product's own may not decide what it is tested with."""
    entropy = oracle.entropy_score(b.hidden_states.tolist(), b.segment.tolist())
    return torch.tensor(oracle.entropy_weight(entropy, b.segment.tolist(), b.num_segments, delta), dtype=torch.float32)


def assigned(b: cases.Batch, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four tensors that histogram and apply have in common."""
    return b.topk_ids, b.topk_weights, weight, b.segment


def lists(*tensors: torch.Tensor | None) -> list[Any]:
    """What the oracle takes."""
    return [None if t is None else t.tolist() for t in tensors]


SELECTIONS = {  # scoring, whether there is a bias, groups, groups of a token
    "softmax_biased": ("softmax", True, 1, 1),
    "grouped": ("softmax", False, 4, 2),
    "deepseek_v3": ("sigmoid", True, 8, 4),
    "sigmoid_grouped": ("sigmoid", False, 2, 1),
    "deepseek_v4": ("sqrtsoftplus", True, 1, 1),
    "all_groups": ("sigmoid", True, 4, 4),
    "groups_of_one": ("softmax", False, 32, 5),
}


def selection_case(name: str, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor | None, str, int, int]:
    """Inputs of `selection_score`: 32 experts, and logits that are not finite."""
    scoring, biased, groups, taken = SELECTIONS[name]
    gen = cases.generator(seed)
    logits = torch.randn(9, 32, generator=gen) * 3
    logits[1, :5] = torch.tensor([math.nan, math.inf, -math.inf, -90.0, 90.0])
    logits[2] = -math.inf
    logits[3] = 0.0  # equal groups: the first is better
    return logits, torch.randn(32, generator=gen) if biased else None, scoring, groups, taken


def assert_selection(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == torch.float32 and torch.equal(got.isfinite(), want.isfinite())
    assert (got[~got.isfinite()] == -math.inf).all()
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-6)


def chain(group: cases.Group) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """(operator, tensors, settings) by name, as the plan of the group's first batch calls them."""
    b, ranks = group.batches[0], {"num_ranks": group.num_ranks}
    entropy = ops.entropy_score(b.hidden_states, b.segment)
    weight = ops.entropy_weight(entropy, b.segment, b.num_segments, 1.0)
    counted = pick(USUAL, HISTOGRAM, num_experts=group.num_experts)
    own = operators.load_histogram(*assigned(b, weight), **counted)
    ordered = pick(USUAL, THRESHOLD, **ranks)
    shift, cut = operators.clip_threshold(own, own, group.modality, **ordered)
    applied = pick(USUAL, APPLY, scoring=group.scoring, **ranks)
    apply_inputs = (*assigned(b, weight), b.router_logits, shift, cut, group.selection(b))
    bias = torch.linspace(-0.5, 0.5, group.num_experts)
    return {
        "entropy_score": (ops.entropy_score, (b.hidden_states, b.segment), {}),
        "entropy_weight": (ops.entropy_weight, (entropy, b.segment, b.num_segments, 1.0), {}),
        "load_histogram": (operators.load_histogram, assigned(b, weight), counted),
        "clip_threshold": (operators.clip_threshold, (own, own, group.modality), ordered),
        "clip_apply": (operators.clip_apply, apply_inputs, applied),
        "selection_score": (ops.selection_score, (b.router_logits, bias, "sigmoid", 2, 1), {}),
    }

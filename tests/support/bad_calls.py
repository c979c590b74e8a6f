"""Calls of the operators that are wrong, each with the word that its message must hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def swapped(position: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A call with the tensor at `position` changed."""

    def call(operator: Callable[..., Any], inputs: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        return operator(*inputs[:position], change(inputs[position]), *inputs[position + 1 :], **settings)

    return call


def with_settings(**changes: Any) -> Callable[..., Any]:
    """A call with other settings."""

    def call(operator: Callable[..., Any], inputs: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        return operator(*inputs, **(settings | changes))

    return call


def _shorter(t: torch.Tensor) -> torch.Tensor:
    return t[:-1]


def _narrower(t: torch.Tensor) -> torch.Tensor:
    return t[:, :-1].contiguous()


def _flat(t: torch.Tensor) -> torch.Tensor:
    return t.flatten()


def _meta(t: torch.Tensor) -> torch.Tensor:
    return t.to("meta")


# Operator, what the message must name, and the call that is wrong.
BAD: list[tuple[str, str, Callable[..., Any]]] = [
    ("entropy_score", "hidden_states", swapped(0, torch.Tensor.double)),
    ("entropy_score", "hidden_states", swapped(0, _flat)),
    ("entropy_score", "segment", swapped(1, torch.Tensor.long)),
    ("entropy_score", "segment", swapped(1, _shorter)),
    ("entropy_score", "segment", swapped(1, _meta)),
    ("entropy_weight", "entropy", swapped(0, torch.Tensor.double)),
    ("entropy_weight", "segment", swapped(1, _shorter)),
    ("entropy_weight", "num_segments", swapped(2, lambda n: -1)),
    ("load_histogram", "topk_ids", swapped(0, torch.Tensor.float)),
    ("load_histogram", "topk_ids", swapped(0, _flat)),
    ("load_histogram", "topk_weights", swapped(1, torch.Tensor.bfloat16)),
    ("load_histogram", "topk_weights", swapped(1, _narrower)),
    ("load_histogram", "weight", swapped(2, _shorter)),
    ("load_histogram", "weight", swapped(2, torch.Tensor.half)),
    ("load_histogram", "segment", swapped(3, torch.Tensor.long)),
    ("load_histogram", "segment", swapped(3, _meta)),
    ("load_histogram", "num_experts", with_settings(num_experts=0)),
    ("load_histogram", "buckets", with_settings(buckets=48)),
    ("load_histogram", "buckets", with_settings(buckets=512)),
    ("load_histogram", "load", with_settings(load="tokens")),
    ("load_histogram", "importance", with_settings(importance="norm")),
    ("clip_threshold", "own", swapped(0, torch.Tensor.long)),
    ("clip_threshold", "own", swapped(0, _shorter)),
    ("clip_threshold", "group", swapped(1, _shorter)),
    ("clip_threshold", "group", swapped(1, torch.Tensor.float)),
    ("clip_threshold", "modality", swapped(2, torch.Tensor.int)),
    ("clip_threshold", "group", swapped(1, _meta)),
    ("clip_threshold", "experts", with_settings(num_ranks=3)),
    ("clip_threshold", "ranks", with_settings(num_ranks=0)),
    ("clip_threshold", "buckets", with_settings(buckets=16)),
    ("clip_threshold", "scope", with_settings(scope="node")),
    ("clip_threshold", "reroute", with_settings(reroute="any")),
    ("clip_threshold", "gamma", with_settings(gamma=0.0)),
    ("clip_threshold", "gamma", with_settings(gamma=math.nan)),
    ("clip_threshold", "rho", with_settings(rho=2.0)),
    ("clip_threshold", "rho", with_settings(rho=math.nan)),
    ("clip_threshold", "alpha", with_settings(alpha=17.0)),
    ("clip_threshold", "alpha", with_settings(alpha=math.nan)),
    ("clip_threshold", "c_min", with_settings(c_min=-1.0)),
    ("clip_apply", "topk_ids", swapped(0, torch.Tensor.short)),
    ("clip_apply", "topk_weights", swapped(1, _narrower)),
    ("clip_apply", "weight", swapped(2, _shorter)),
    ("clip_apply", "segment", swapped(3, _shorter)),
    ("clip_apply", "router_logits", swapped(4, torch.Tensor.bfloat16)),
    ("clip_apply", "router_logits", swapped(4, _narrower)),
    ("clip_apply", "router_logits", swapped(4, _meta)),
    ("clip_apply", "shift", swapped(5, torch.Tensor.long)),
    ("clip_apply", "cut", swapped(6, _narrower)),
    ("clip_apply", "cut", swapped(6, _shorter)),
    ("clip_apply", "cut", swapped(6, torch.Tensor.float)),
    ("clip_apply", "experts", with_settings(num_ranks=5)),
    ("clip_apply", "buckets", with_settings(buckets=96)),
    ("clip_apply", "scoring", with_settings(scoring="tanh")),
    ("clip_apply", "selection", swapped(7, lambda _: torch.zeros(40, 15))),
    ("clip_apply", "selection", swapped(7, lambda _: torch.zeros(40, 16, dtype=torch.float64))),
    ("selection_score", "router_logits", swapped(0, torch.Tensor.double)),
    ("selection_score", "router_logits", swapped(0, _flat)),
    ("selection_score", "correction_bias", swapped(1, torch.Tensor.bfloat16)),
    ("selection_score", "correction_bias", swapped(1, _shorter)),
    ("selection_score", "correction_bias", swapped(1, _meta)),
    ("selection_score", "scoring", swapped(2, lambda _: "tanh")),
    ("selection_score", "num_groups", swapped(3, lambda _: 3)),
    ("selection_score", "num_groups", swapped(3, lambda _: 16)),
    ("selection_score", "topk_groups", swapped(4, lambda _: 3)),
    ("selection_score", "topk_groups", swapped(4, lambda _: 0)),
]


def with_value(position: int, index: Any, value: int) -> Callable[..., Any]:
    """A call with one entry of the tensor at `position` changed."""

    def changed(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[index] = value
        return t

    return swapped(position, changed)

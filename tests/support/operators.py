"""The operators by single options, as the oracle takes them: what a test leaves out is what a plan has by default."""

from __future__ import annotations

from typing import Any

import torch

from sglang_macs import ops
from sglang_macs.config import MacsConfig
from sglang_macs.ops import policy


def policy_of(**options: Any) -> policy.Policy:
    """Packed; only `num_experts` has to be given."""
    model = {"num_ranks": 1, "scoring": "softmax", "needs_entropy": True}
    return policy.of_config(MacsConfig(), **model | options)


def load_histogram(*routing: torch.Tensor, **options: Any) -> torch.Tensor:
    return ops.load_histogram(*routing, policy_of(**options))


def clip_threshold(
    own: torch.Tensor, group: torch.Tensor, modality: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.clip_threshold(own, group, modality, policy_of(num_experts=modality.numel(), **options))


def clip_apply(*inputs: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """inputs: up to `cut`, and what orders candidates, if anything does."""
    inputs, selection = inputs[:7], inputs[7] if len(inputs) > 7 else None
    return ops.clip_apply(*inputs, policy_of(num_experts=inputs[5].numel(), **options), selection=selection)

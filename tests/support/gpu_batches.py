"""Batches for tests on a GPU."""

import torch

EXPERTS, RANKS = 128, 8


def batch(
    tokens: int,
    top_k: int,
    seed: int,
    dtype=torch.bfloat16,
    hidden_size: int = 256,
    experts: int = EXPERTS,
    skew: float = 1.5,
):
    """Skewed routing, some empty slots, two thirds visual; on the CPU."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=g).to(dtype)
    logits = torch.randn(tokens, experts, generator=g) + torch.linspace(skew, 0, experts)
    weights, ids = torch.softmax(logits, -1).topk(top_k)
    empty = torch.rand(ids.shape, generator=g) < 0.05
    segment = torch.where(torch.rand(tokens, generator=g) < 0.67, 0, -1).int()
    return hidden, ids.masked_fill(empty, -1), weights.masked_fill(empty, 0.0), logits, segment


def to_gpu(*tensors: torch.Tensor):
    return [t.cuda() for t in tensors]

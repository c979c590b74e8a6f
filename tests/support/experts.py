"""Experts that need no weights, tokens for them, and what a layer of them gives."""

import torch

EXPERTS, TOP_K, HIDDEN = 12, 3, 16


def tokens(rank: int, count: int, seed: int = 0):
    """Hidden states that name themselves (rank, token), skewed routing with some empty slots, and normalised gates."""
    g = torch.Generator().manual_seed(seed * 97 + rank)
    hidden = torch.randn(count, HIDDEN, generator=g)
    hidden[:, 0], hidden[:, 1] = float(rank), torch.arange(count).float()
    logits = torch.randn(count, EXPERTS, generator=g) + torch.linspace(2, 0, EXPERTS)
    weights, ids = torch.softmax(logits, -1).topk(TOP_K)
    empty = torch.rand(ids.shape, generator=g) < 0.1
    return hidden, ids.masked_fill(empty, -1), weights.masked_fill(empty, 0.0), logits


def expert_output(hidden: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """A different linear map for every expert, so that a row at the wrong expert is seen."""
    return hidden * (expert + 1).unsqueeze(1) + expert.unsqueeze(1)


def dense(hidden, ids, weights) -> torch.Tensor:
    """What dispatch, experts and combine must give together."""
    out = torch.zeros_like(hidden)
    for k in range(ids.shape[1]):
        valid = ids[:, k] >= 0
        out[valid] += weights[valid, k : k + 1] * expert_output(hidden[valid], ids[valid, k])
    return out

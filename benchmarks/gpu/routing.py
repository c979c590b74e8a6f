"""Routing with a chosen imbalance: a softmax router whose bias is fitted until its experts get the rows asked for."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LOADS = Path(__file__).resolve().parents[2] / "sglang_macs" / "simulate" / "qwen3vl_30b_a3b.json"


def skewed(num_experts: int, num_ranks: int, max_over_mean: float, seed: int = 0) -> torch.Tensor:
    """[E] f64 shares that sum to 1: rank 0 carries `max_over_mean` times the mean, the others share the rest evenly;
    within a rank experts differ by up to a third.
    """
    generator = torch.Generator().manual_seed(seed)
    local = num_experts // num_ranks
    within = 1 + torch.rand(num_ranks, local, generator=generator, dtype=torch.float64) / 3
    within /= within.sum(1, keepdim=True)
    rank = torch.full((num_ranks,), (num_ranks - max_over_mean) / (num_ranks - 1), dtype=torch.float64)
    rank[0] = max_over_mean
    return (within * (rank / num_ranks).unsqueeze(1)).flatten()


def published(layer: int) -> torch.Tensor:
    """[E] f64 shares of a layer of Qwen3-VL-30B-A3B, as published (the file names the source)."""
    rows = torch.tensor(json.loads(LOADS.read_text())["expert_rows_by_layer"][str(layer)], dtype=torch.float64)
    return rows / rows.sum()


def fit_bias(shares: torch.Tensor, top_k: int, device: str = "cuda", tokens: int = 1 << 15) -> torch.Tensor:
    """[E] f32 logit bias under which a top-k router over unit normal noise gives experts `shares` of the rows."""
    generator = torch.Generator(device=device).manual_seed(1)
    noise = torch.randn(tokens, shares.numel(), generator=generator, device=device)
    wanted = shares.to(device).float()
    bias = torch.zeros_like(wanted)
    for step in range(60):
        ids = (noise + bias).topk(top_k).indices
        got = torch.bincount(ids.flatten(), minlength=shares.numel()).clamp(min=1) / ids.numel()
        bias += (wanted / got).log() * (0.5 if step < 40 else 0.2)
    return bias


def route(bias: torch.Tensor, tokens: int, top_k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids [T, K] i64, gates [T, K] f32 normalised over K, logits [T, E] f32) of fresh tokens, on the bias's device."""
    generator = torch.Generator(device=bias.device).manual_seed(seed)
    logits = torch.randn(tokens, bias.numel(), generator=generator, device=bias.device) + bias
    top, ids = logits.topk(top_k)
    return ids, torch.softmax(top, -1), logits

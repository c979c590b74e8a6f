"""What one fused dispatch and its combine have to leave behind, from the inputs of all ranks, written from
docs/design/method.md and csrc/include/macs/fused.h, sharing nothing with csrc.

The entropy weights are given (they are floats, and checked by themselves); everything that follows from them is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import kernel_reference
from .fused_case import FusedConfig, Inputs
from .oracle import clip_threshold

SCALE_FEATURES = 128
FP8_MOST, FP8_LEAST = 448.0, 1e-4


@dataclass
class RankPlan:
    """Decisions of one rank: ids, weights (f64) [T, K], counts [3, E, 2], cut [NB, 4], sums [4]."""

    ids: np.ndarray
    weights: np.ndarray
    counts: np.ndarray
    cut: np.ndarray
    sums: np.ndarray


def plan_group(config: FusedConfig, ranks: list[Inputs], weights: list[np.ndarray]) -> list[RankPlan]:
    """The composed plan of every rank of the group: histogram, sum, threshold, apply."""
    f = config.plan
    common = {"buckets": f.buckets, "load": f.load, "importance": f.importance}
    routing = [(x.ids, x.gates, w, x.segment) for x, w in zip(ranks, weights, strict=True)]
    own = [kernel_reference.load_histogram(*one, num_experts=f.E, **common) for one in routing]
    group = sum(own)
    plans = []
    for inputs, one, histogram in zip(ranks, routing, own, strict=True):
        shift, cut = clip_threshold(
            histogram.tolist(), group.tolist(), ranks[0].modality.tolist(), num_ranks=f.R, buckets=f.buckets,
            scope=f.scope, load=f.load, reroute=f.reroute, protect_text=f.protect_text, gamma=f.gamma, rho=f.rho,
            alpha=f.alpha, c_min=f.c_min,
        )  # fmt: skip
        applied = kernel_reference.clip_apply(
            *one, inputs.logits, np.array(shift), np.array(cut), num_ranks=f.R, scope=f.scope, reroute=f.reroute,
            protect_text=f.protect_text, reroute_rounds=f.rounds, scoring=f.scoring, **common,
        )  # fmt: skip
        plans.append(RankPlan(*applied, np.array(cut), group[-4:]))
    return plans


@dataclass
class Placement:
    """Where the rows of a group lie.

    received, starts: [E] rows of each expert, and its first row in its rank's buffer. positions: [R, T, K], -1 for
    none. source: [R, rows] of every row of every buffer: source rank * T + token, -1 where nothing lies.
    """

    received: Tensor
    starts: Tensor
    positions: Tensor
    source: Tensor


def place(config: FusedConfig, ids: Tensor) -> Placement:
    """Rows of every expert by (source, token, slot); experts one behind the other, or each in rows of its own.

    Where rows are carried as they are routed, the first source is the rank behind the expert's, its own the last.

    ids: [R, T, K] of all ranks, -1 also where a rank has fewer tokens. No host synchronisation: may be captured.
    """
    f, local = config.plan, config.local
    expert = torch.where(ids < 0, f.E, ids).flatten().long()
    zeros = torch.zeros(f.E + 1, dtype=torch.int64, device=ids.device)
    received = zeros.scatter_add(0, expert, torch.ones_like(expert))
    before = received.cumsum(0) - received  # in the order below
    if config.expert_rows:
        starts = (torch.arange(f.E, device=ids.device) % local) * config.expert_rows
    else:
        room = -(-received[:-1] // config.alignment) * config.alignment
        room = room.view(f.R, local)
        starts = (room.cumsum(1) - room).flatten()
    source_order = torch.zeros_like(expert)
    if config.carried:
        source = torch.arange(f.R, device=ids.device).view(f.R, 1, 1).expand(ids.shape).flatten()
        source_order = (source - expert // local - 1) % f.R
    order = torch.sort(expert * f.R + source_order, stable=True).indices
    of_row = expert[order]
    at = torch.arange(len(expert), device=ids.device) - before[of_row] + torch.cat([starts, starts[:1] * 0])[of_row]
    positions = torch.empty_like(expert).scatter_(0, order, torch.where(of_row < f.E, at, -1))
    rank_of = torch.where(of_row < f.E, of_row // local, f.R)  # what lies nowhere goes to a rank too many
    source = torch.full(((f.R + 1) * config.rows,), -1, dtype=torch.int64, device=ids.device)
    source.scatter_(0, rank_of * config.rows + at * (of_row < f.E), order // f.K)
    return Placement(received[:-1], starts, positions.view(ids.shape), source.view(f.R + 1, -1)[:-1])


def cast(hidden: Tensor, format: str) -> tuple[Tensor, Tensor | None]:
    """hidden [T, H] bf16 on its way: bytes [T, row bytes] u8, and scales [T, words] as i32, None for bf16.

    The cast is DeepEP's: amax of 128 features, at least 1e-4; the exponent of a scale is rounded up where it is to be a
    power of two.
    """
    if format == "bfloat16":
        return hidden.contiguous().view(torch.uint8).view(len(hidden), -1), None
    blocks = hidden.float().view(len(hidden), -1, SCALE_FEATURES)
    amax = blocks.abs().amax(2).clamp(min=FP8_LEAST)
    most = torch.full_like(amax, FP8_MOST)  # a tensor: a number over a tensor is its reciprocal times the number
    back, to = amax * most.reciprocal(), most / amax
    if format != "fp8":
        bits = back.view(torch.int32)
        exponent = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).int()
        back, to = ((exponent + 127) << 23).view(torch.float32), ((127 - exponent) << 23).view(torch.float32)
    features = (blocks * to.unsqueeze(2)).to(torch.float8_e4m3fn).view(torch.uint8).view(len(hidden), -1)
    if format != "fp8_ue8m0":
        return features, back.contiguous().view(torch.int32)
    exponents = torch.nn.functional.pad((exponent + 127).to(torch.uint8), (0, -back.shape[1] % 4))
    return features, exponents.contiguous().view(torch.int32)


def combine(
    config: FusedConfig, ids: Tensor, weights: Tensor, positions: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """[R, T, H] f64 sums of outputs [R, rows, H] bf16 under weights [R, T, K], and the sums of their sizes."""
    owner = ids.clamp(min=0) // config.local
    total = torch.zeros((*ids.shape[:2], config.plan.H), dtype=torch.float64, device=ids.device)
    size = torch.zeros_like(total)
    for slot in range(ids.shape[2]):
        at = positions[..., slot]
        rows = outputs[owner[..., slot], at.clamp(min=0)].double()
        weighed = torch.where(at < 0, 0.0, weights[..., slot].double()).unsqueeze(-1) * rows
        total += weighed
        size += weighed.abs()
    return total, size

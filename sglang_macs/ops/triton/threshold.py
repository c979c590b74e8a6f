"""clip_threshold (docs/design/method.md 4): three small kernels, each over what the one before it left.

The double arithmetic is that of csrc/cpu/clip_threshold.cpp in its order, compiled without contraction (EXACT).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...choices import WEIGHT_ONE
from ..policy import unpack
from . import checks
from .level import cut_level, level_of

EXACT = {"enable_fp_fusion": False}


@triton.jit
def scaled_capacity(sums, base, modality, gamma, rho, c_min):
    """Rows [f64] that an expert of this modality may have, from `base` by the batch's mix; `sums` = the group's N,
    N_visual, W_visual, W.
    """
    weight = tl.load(sums + 3).to(tl.float64)
    share = tl.load(sums + 2).to(tl.float64) / tl.where(weight > 0, weight, 1.0)
    share = tl.where(weight > 0, share, 0.5)
    rows = base * (modality.to(tl.float64) * rho * (share - 0.5) + 1.0)
    least = tl.full([], c_min, tl.float64)  # a comparison takes a Python float for f32
    rows = tl.where(rows > least, rows, least)
    return tl.where(gamma == float("inf"), float("inf"), rows)


@triton.jit
def _capacity(sums, modality, gamma, rho, c_min, NUM_EXPERTS: tl.constexpr):
    base = tl.load(sums).to(tl.float64) * gamma / NUM_EXPERTS
    return scaled_capacity(sums, base, modality, gamma, rho, c_min)


@triton.jit
def to_bound(units):
    fits = units < 2147483648.0  # not so inf and NaN (inf * 0): no bound
    return tl.where(fits, tl.where(fits, units, 0.0).to(tl.int64), 2147483647)


@triton.jit
def pressure_shift(load, capacity, alpha_q16, BITS: tl.constexpr):
    """Buckets that an expert over its capacity moves down: alpha log2(load / capacity) by the float's own bits."""
    most = (16 << BITS) - 1
    ratio = (load / tl.where(capacity > 0, capacity, 1.0)).to(tl.float32)
    log2_q23 = ratio.to(tl.int32, bitcast=True).to(tl.int64) - (127 << 23)
    shift = tl.minimum((log2_q23 * alpha_q16 + (1 << (38 - BITS))) >> (39 - BITS), most).to(tl.int32)
    return tl.where(load > capacity, tl.where(capacity > 0, shift, most), 0)


@triton.jit
def _levels_kernel(
    own, group, modality, shift, levels,
    gamma: tl.float64, rho: tl.float64, c_min: tl.float64, alpha_q16,
    NUM_EXPERTS: tl.constexpr, NUM_BOUNDS: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr,
    PRESSURE: tl.constexpr, PROTECT_TEXT: tl.constexpr,
):  # fmt: skip
    """One program per expert: its shift, and its units added to its bound's levels [2 = group | own, NB, 2 B] i32."""
    LEVELS: tl.constexpr = 2 * (16 << BITS)
    expert = tl.program_id(0)
    cell = tl.arange(0, LEVELS)
    group_units = tl.load(group + expert * LEVELS + cell)
    own_units = tl.load(own + expert * LEVELS + cell)
    moved = 0
    if PRESSURE:
        load = tl.sum(group_units.to(tl.int64)).to(tl.float64) / UNIT
        capacity = _capacity(
            group + NUM_EXPERTS * LEVELS, tl.load(modality + expert), gamma, rho, c_min, NUM_EXPERTS
        )  # fmt: skip
        moved = pressure_shift(load, capacity, alpha_q16, BITS)
    tl.store(shift + expert, moved)
    level = level_of(cell % (LEVELS // 2), moved, cell >= LEVELS // 2, PROTECT_TEXT, BITS)
    place = levels + expert // (NUM_EXPERTS // NUM_BOUNDS) * LEVELS + level
    tl.atomic_add(place, group_units, mask=group_units != 0, sem="relaxed")
    tl.atomic_add(place + NUM_BOUNDS * LEVELS, own_units, mask=own_units != 0, sem="relaxed")


@triton.jit
def _cut_kernel(
    group, modality, levels, cut, shares,
    gamma: tl.float64, rho: tl.float64, c_min: tl.float64,
    NUM_EXPERTS: tl.constexpr, NUM_BOUNDS: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, BY_RANK: tl.constexpr,
):  # fmt: skip
    """A program per bound: cut [4] but for the room; shares [3] i64 = room of the group, what group and own give up."""
    LEVELS: tl.constexpr = 2 * (16 << BITS)
    n = tl.program_id(0)
    level = tl.arange(0, LEVELS)
    group_units = tl.load(levels + n * LEVELS + level).to(tl.int64)
    own_units = tl.load(levels + (NUM_BOUNDS + n) * LEVELS + level).to(tl.int64)
    sums = group + NUM_EXPERTS * LEVELS
    if BY_RANK:
        rows = tl.load(sums).to(tl.float64) * gamma / NUM_BOUNDS
    else:
        rows = _capacity(sums, tl.load(modality + n), gamma, rho, c_min, NUM_EXPERTS)
    bound = to_bound(rows * UNIT)

    at = cut_level(group_units, level, bound, 0)
    left = bound - tl.sum(tl.where(level > at, group_units, 0))
    here = tl.sum(tl.where(level == at, group_units, 0))
    own_here = tl.sum(tl.where(level == at, own_units, 0))
    tl.store(cut + n * 4, at)
    tl.store(cut + n * 4 + 1, left * own_here // tl.maximum(here, 1))
    tl.store(cut + n * 4 + 3, bound)
    tl.store(shares + n * 3, tl.where(at < 0, left, 0))
    tl.store(shares + n * 3 + 1, tl.sum(tl.where(level <= at, group_units, 0)))
    tl.store(shares + n * 3 + 2, tl.sum(tl.where(level <= at, own_units, 0)))


@triton.jit
def share_room_kernel(
    cut, shares, NUM_BOUNDS: tl.constexpr, NUM_RANKS: tl.constexpr, REROUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per rank: the group's room of its bounds becomes this rank's share, floor(room * own / group)."""
    n = tl.arange(0, BLOCK)
    inside = n < NUM_BOUNDS
    here = inside & (n // (NUM_BOUNDS // NUM_RANKS) == tl.program_id(0))
    near = inside if REROUTE == 2 else here
    at_stake = tl.sum(tl.load(shares + n * 3 + 1, mask=near, other=0))
    own = tl.sum(tl.load(shares + n * 3 + 2, mask=near, other=0))
    room = tl.load(shares + n * 3, mask=here, other=0) * own // tl.maximum(at_stake, 1)
    if REROUTE == 0:
        room = tl.zeros_like(room)
    tl.store(cut + n * 4 + 2, room, mask=here)


def clip_threshold(own: Tensor, group: Tensor, modality: Tensor, policy: list[float]) -> tuple[Tensor, Tensor]:
    p = unpack(policy)
    checks.thresholds(own, group, modality, p, checks.histogram_size(p))
    own, group, modality = own.contiguous(), group.contiguous(), modality.contiguous()
    num_experts, num_ranks, bits = p.num_experts, p.num_ranks, p.bucket_bits
    by_rank, unit = p.scope == 1, WEIGHT_ONE if p.load == 1 else 1
    bounds = p.gamma, p.rho, p.c_min
    num_bounds = num_ranks if by_rank else num_experts
    shift = torch.empty(num_experts, dtype=torch.int32, device=own.device)
    cut = torch.empty(num_bounds, 4, dtype=torch.int32, device=own.device)
    shares = torch.empty(num_bounds, 3, dtype=torch.int64, device=own.device)
    levels = torch.zeros(2, num_bounds, 2 * p.buckets, dtype=torch.int32, device=own.device)
    alpha_q16 = round(65536 * p.alpha)  # half to even, as rint
    _levels_kernel[(num_experts,)](
        own, group, modality, shift, levels, *bounds, alpha_q16,
        num_experts, num_bounds, bits, unit, by_rank and p.alpha > 0, p.protect_text, **EXACT,
    )  # fmt: skip
    _cut_kernel[(num_bounds,)](
        group, modality, levels, cut, shares, *bounds, num_experts, num_bounds, bits, unit, by_rank, **EXACT
    )
    share_room_kernel[(num_ranks,)](cut, shares, num_bounds, num_ranks, p.reroute, triton.next_power_of_2(num_bounds))
    return shift, cut

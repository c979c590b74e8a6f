"""replica_balance (docs/design/method.md 3b, 4b).

Ranks' loads and places' quotas lie in memory; the double arithmetic is that of csrc/cpu in its order (EXACT).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .level import cut_level, level_of
from .places import read
from .threshold import EXACT, pressure_shift, scaled_capacity, share_room_kernel, to_bound

SWEEPS = 8  # kBalanceSweeps of csrc/include/macs/replicas.h


@triton.jit
def _split_kernel(
    group, modality, first, rank, shift, rows, quota, load,
    gamma: tl.float64, rho: tl.float64, c_min: tl.float64, alpha_q16,
    NUM_EXPERTS: tl.constexpr, RANKS: tl.constexpr, BITS: tl.constexpr, PRESSURE: tl.constexpr,
):  # fmt: skip
    """One program per expert: its shift, its rows [2 = all | text, E], and these split evenly among its places."""
    LEVELS: tl.constexpr = 2 * (16 << BITS)
    expert = tl.program_id(0)
    cell = tl.arange(0, LEVELS)
    units = tl.load(group + expert * LEVELS + cell)
    total = tl.sum(units)
    tl.store(rows + expert, total)
    tl.store(rows + NUM_EXPERTS + expert, tl.sum(tl.where(cell >= LEVELS // 2, units, 0)))
    begin = tl.load(first + expert)
    count = tl.load(first + expert + 1) - begin
    moved = 0
    if PRESSURE:
        sums = group + NUM_EXPERTS * LEVELS
        base = tl.load(sums).to(tl.float64) * gamma / tl.load(first + NUM_EXPERTS).to(tl.float64)
        base = base * count.to(tl.float64)  # an expert's capacity grows with its places
        capacity = scaled_capacity(sums, base, tl.load(modality + expert), gamma, rho, c_min)
        moved = pressure_shift(total.to(tl.float64), capacity, alpha_q16, BITS)
    tl.store(shift + expert, moved)
    place = tl.arange(0, RANKS)
    here = place < count
    many = total.to(tl.int64)
    part = (many * (place + 1) // count - many * place // count).to(tl.int32)
    tl.store(quota + begin + place, part, mask=here)
    tl.atomic_add(load + tl.load(rank + begin + place, mask=here, other=0), part, mask=here, sem="relaxed")


@triton.jit
def _poured(rows, beside, here):
    """Rows onto places of loads `beside`, as water finds its level; the rest, one each, to the first at the level.

    The level is the least of those that the lowest places would have by themselves, over all their numbers.
    """
    lower = here[None, :] & (beside[None, :] <= beside[:, None])
    below = tl.sum(tl.where(lower, beside[None, :], 0), 1)
    alone = (rows + below) // tl.maximum(tl.sum(lower.to(tl.int32), 1), 1)
    level = tl.min(tl.where(here, alone, 2147483647))
    poured = tl.where(here, tl.maximum(level - beside, 0), 0)
    at_level = here & (beside <= level)
    first = at_level & (tl.cumsum(at_level.to(tl.int32), 0) <= rows - tl.sum(poured))
    return poured + first.to(tl.int32)


@triton.jit
def _pour_kernel(
    rows, head, first, rank, step_order, quota, load, SWEEPS: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """One program: replicated experts one after the other, in sweeps until one changes nothing."""
    place = tl.arange(0, RANKS)
    replicated = tl.load(head + 1)
    sweep = 0
    changed = 1
    while (sweep < SWEEPS) & (changed > 0):
        changed = 0
        for i in range(replicated):
            expert = tl.load(step_order + i)
            begin = tl.load(first + expert)
            here = place < tl.load(first + expert + 1) - begin
            at = load + tl.load(rank + begin + place, mask=here, other=0)
            before = tl.load(quota + begin + place, mask=here, other=0)
            beside = tl.load(at, mask=here, other=0) - before
            poured = _poured(tl.load(rows + expert), beside, here)
            tl.debug_barrier()  # all threads have read
            tl.store(quota + begin + place, poured, mask=here)
            tl.store(at, beside + poured, mask=here)
            tl.debug_barrier()  # and see what others wrote
            changed += tl.sum((here & (poured != before)).to(tl.int32))
        sweep += 1


@triton.jit
def _bound(sums, gamma, NUM_RANKS: tl.constexpr):
    return to_bound(tl.load(sums).to(tl.float64) * gamma / NUM_RANKS)


@triton.jit
def _exceeded_kernel(
    own, group, shift, rows, quota, load, first, rank, levels, text_rows, gamma: tl.float64,
    NUM_EXPERTS: tl.constexpr, NUM_RANKS: tl.constexpr, BITS: tl.constexpr, PROTECT_TEXT: tl.constexpr,
):  # fmt: skip
    """One program per expert: onto the ranks that are over their bound, its text rows there, and its cells by level
    [2 = group | own, R, 2 B] in 256ths of a row, by its share there.
    """
    LEVELS: tl.constexpr = 2 * (16 << BITS)
    expert = tl.program_id(0)
    cell = tl.arange(0, LEVELS)
    group_units = tl.load(group + expert * LEVELS + cell).to(tl.int64)
    own_units = tl.load(own + expert * LEVELS + cell).to(tl.int64)
    moved = tl.load(shift + expert)
    level = level_of(cell % (LEVELS // 2), moved, cell >= LEVELS // 2, PROTECT_TEXT, BITS)
    bound = _bound(group + NUM_EXPERTS * LEVELS, gamma, NUM_RANKS)
    begin = tl.load(first + expert)
    count = tl.load(first + expert + 1) - begin
    total = tl.load(rows + expert).to(tl.int64)
    left = total
    left_text = tl.load(rows + NUM_EXPERTS + expert).to(tl.int64)
    until = total * 0
    share_until = total * 0
    for i in range(count):
        part = tl.load(quota + begin + i).to(tl.int64)
        until += part
        end = tl.where(total > 0, 256 * until // tl.maximum(total, 1), 256)
        share = end - share_until
        share_until = end
        text = tl.where(i == count - 1, left_text, left_text * part // tl.maximum(left, 1))
        left_text -= text
        left -= part
        on = tl.load(rank + begin + i)
        if tl.load(load + on) > bound:
            tl.atomic_add(text_rows + on, text.to(tl.int32), sem="relaxed")
            at = levels + on * LEVELS + level
            tl.atomic_add(at, share * group_units, mask=group_units != 0, sem="relaxed")
            tl.atomic_add(at + NUM_RANKS * LEVELS, share * own_units, mask=own_units != 0, sem="relaxed")


@triton.jit
def _limit_kernel(
    sums, load, levels, text_rows, limits, shares, gamma: tl.float64,
    NUM_RANKS: tl.constexpr, BITS: tl.constexpr, PROTECT_TEXT: tl.constexpr,
):  # fmt: skip
    """One program per rank: limits [4] but for the room; shares [3] i64 as those of `clip_threshold`."""
    BUCKETS: tl.constexpr = 16 << BITS
    LEVELS: tl.constexpr = 2 * BUCKETS
    rank = tl.program_id(0)
    level = tl.arange(0, LEVELS)
    group_units = tl.load(levels + rank * LEVELS + level)
    own_units = tl.load(levels + (NUM_RANKS + rank) * LEVELS + level)
    bound = _bound(sums, gamma, NUM_RANKS)
    left = bound - tl.load(load + rank)
    exceeded = left < 0
    first = 0
    end = LEVELS
    room = bound
    if PROTECT_TEXT:
        of_text = tl.load(text_rows + rank)
        fits = of_text <= bound
        first = tl.where(fits, 0, BUCKETS)  # or no visual row stays
        end = tl.where(fits, BUCKETS, LEVELS)  # all text stays
        room = tl.where(fits, bound - of_text, bound)
    counted = (level >= first) & (level < end)
    group_counted = tl.where(counted, group_units, 0)
    own_counted = tl.where(counted, own_units, 0)
    top = 256 * room
    total = tl.sum(group_counted)
    at = cut_level(group_counted, level, top, first)
    above = tl.sum(tl.where(level > at, group_counted, 0))
    here = tl.sum(tl.where(level == at, group_counted, 0))
    own_here = tl.sum(tl.where(level == at, own_counted, 0))
    kept_of_cut = tl.sum(tl.where(level > at, own_counted, 0)) + (top - above) * own_here // tl.maximum(here, 1)
    kept_of_all = top * tl.sum(own_counted) // tl.maximum(total, 1)
    kept = tl.where(total > top, kept_of_cut, kept_of_all)
    tl.store(limits + rank * 4, tl.where(exceeded, kept // 256, -1))
    tl.store(limits + rank * 4 + 1, tl.where(exceeded, first, 0))
    tl.store(limits + rank * 4 + 3, bound)
    given_up = exceeded & (level <= at)
    tl.store(shares + rank * 3, tl.where(exceeded, 0, left))
    tl.store(shares + rank * 3 + 1, tl.sum(tl.where(given_up, group_units, 0)))
    tl.store(shares + rank * 3 + 2, tl.sum(tl.where(given_up, own_units, 0)))


def replica_balance(
    own: Tensor, group: Tensor, modality: Tensor, policy: list[float], places: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, placed = read(policy, places, own)
    checks.thresholds(own, group, modality, p, checks.exchange_size(p, placed.num_physical))
    own, group, modality = own.contiguous(), group.contiguous(), modality.contiguous()
    num_experts, num_ranks, bits = p.num_experts, p.num_ranks, p.bucket_bits
    lanes = triton.next_power_of_2(num_ranks)
    shift, rows = torch.empty_like(placed.row), own.new_empty(2, num_experts)
    quota, load, text_rows = own.new_zeros(placed.num_physical), own.new_zeros(num_ranks), own.new_zeros(num_ranks)
    limits = own.new_empty(num_ranks, 4)
    shares = torch.empty(num_ranks, 3, dtype=torch.int64, device=own.device)
    levels = torch.zeros(2, num_ranks, 2 * p.buckets, dtype=torch.int64, device=own.device)
    by_expert, at = (num_experts,), (placed.first, placed.rank)
    _split_kernel[by_expert](
        group, modality, *at, shift, rows, quota, load, p.gamma, p.rho, p.c_min, round(65536 * p.alpha),
        num_experts, lanes, bits, p.alpha > 0, **EXACT,
    )  # fmt: skip
    _pour_kernel[(1,)](rows, placed.head, *at, placed.step_order, quota, load, SWEEPS, lanes)
    _exceeded_kernel[by_expert](
        own, group, shift, rows, quota, load, *at, levels, text_rows, p.gamma,
        num_experts, num_ranks, bits, p.protect_text, **EXACT,
    )  # fmt: skip
    sums = group[num_experts * 2 * p.buckets :]
    _limit_kernel[(num_ranks,)](
        sums, load, levels, text_rows, limits, shares, p.gamma, num_ranks, bits, p.protect_text, **EXACT
    )
    share_room_kernel[(num_ranks,)](limits, shares, num_ranks, num_ranks, p.reroute, lanes)
    return shift, quota, load, limits

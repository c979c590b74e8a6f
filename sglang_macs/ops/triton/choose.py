"""replica_choose (docs/design/method.md 3b, 4b).

Rows are numbered over blocks of BLOCK flat slots (token * K + slot), as `clip_apply` accepts them; a row's number gives
its place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .level import bucket_of, cut_level, importance_of, level_of, load_assignments, logical_of, store_before
from .places import read

BLOCK = 128  # slots; a block compares every pair of them
PREFIX_BLOCK = 1024


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _count_rows_kernel(
    ids, segment, logical, row, totals, num_slots, num_blocks, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """totals [X * 2 = text | visual, blocks]: this rank's rows of replicated experts."""
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_slots
    expert = logical_of(tl.load(ids + index, mask=inside, other=-1).to(tl.int32), logical)
    of_expert = tl.load(row + expert, mask=expert >= 0, other=-1)
    visual = tl.load(segment + index // TOP_K, mask=inside, other=-1) >= 0
    kind = of_expert * 2 + visual.to(tl.int32)
    one = tl.full([BLOCK], 1, tl.int32)
    tl.atomic_add(totals + kind * num_blocks + block, one, mask=of_expert >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_blocks"])
def _number_kernel(
    exchanged, head, totals, base, rows, num_blocks,
    NUM_RANKS: tl.constexpr, REDUNDANT: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per replicated expert and modality: base [X * 2, blocks], the number of each block's first row of
    that kind, text before visual and each by source rank; rows [X] of the group.
    """
    kind = tl.program_id(0)
    expert = kind // 2
    source = tl.arange(0, RANKS)
    at = exchanged + NUM_RANKS + 2 * (source * REDUNDANT + expert)
    text = tl.load(at, mask=source < NUM_RANKS, other=0)
    visual = tl.load(at + 1, mask=source < NUM_RANKS, other=0)
    tl.store(rows + expert, tl.sum(text + visual))
    in_front = source < tl.load(head)
    before_text = tl.sum(tl.where(in_front, text, 0))
    before_visual = tl.sum(text) + tl.sum(tl.where(in_front, visual, 0))
    store_before(totals, base, kind, tl.where(kind % 2 == 0, before_text, before_visual), num_blocks, BLOCK)


@triton.jit
def _place_of(number, rows, quota, count):
    """Which of `count` places, with their quotas from `quota` on, the row of that number goes to: nested floors."""
    number, rows = number.to(tl.int64), rows.to(tl.int64)
    place = tl.zeros_like(count)
    on_its_way = count > 1
    for i in range(tl.max(count) - 1):
        part = tl.load(quota + i, mask=on_its_way, other=0).to(tl.int64)
        some = tl.maximum(rows, 1)
        before = number * part // some
        on_its_way = on_its_way & ((number + 1) * part // some == before)
        number -= before
        rows -= part
        place += on_its_way.to(tl.int32)
        on_its_way = on_its_way & (i + 2 < count)
    return place


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _choose_kernel(
    ids, gates, weight, segment, shift, quota, limits, logical, first, rank, physical, row, base, rows,
    chosen, levels, num_slots, num_blocks,
    TOP_K: tl.constexpr, BITS: tl.constexpr, IMPORTANCE: tl.constexpr, PROTECT_TEXT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every slot's copy, and this rank's rows [R, 2 B] by level on the ranks that are over their bound."""
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_slots
    routed, gate, w, text = load_assignments(index, inside, ids, gates, weight, segment, TOP_K)
    expert = logical_of(routed, logical)
    used = expert >= 0
    of_expert = tl.load(row + expert, mask=used, other=-1)
    replicated = of_expert >= 0
    kind = tl.where(replicated, of_expert * 2 + 1 - text.to(tl.int32), -1)
    in_front = (kind[None, :] == kind[:, None]) & (index[None, :] < index[:, None])
    number = tl.load(base + kind * num_blocks + block, mask=replicated, other=0) + tl.sum(in_front.to(tl.int32), 1)
    begin = tl.load(first + expert, mask=used, other=0)
    count = tl.where(replicated, tl.load(first + expert + 1, mask=used, other=0) - begin, 0)
    many = tl.load(rows + of_expert, mask=replicated, other=0)
    place = begin + _place_of(number, many, quota + begin, count)
    tl.store(chosen + index, tl.load(physical + place, mask=used, other=-1), mask=inside)
    on = tl.load(rank + place, mask=used, other=0)
    exceeded = tl.load(limits + on * 4, mask=used, other=-1) >= 0
    bucket = bucket_of(importance_of(w, gate, IMPORTANCE), BITS)
    level = level_of(bucket, tl.load(shift + expert, mask=used, other=0), text, PROTECT_TEXT, BITS)
    one = tl.full([BLOCK], 1, tl.int32)
    tl.atomic_add(levels + on * (2 * (16 << BITS)) + level, one, mask=exceeded, sem="relaxed")


@triton.jit
def _own_cut_kernel(limits, levels, cut, BITS: tl.constexpr, PROTECT_TEXT: tl.constexpr):
    """One program per rank: the best rows up to the limit stay, counted on what is really sent."""
    BUCKETS: tl.constexpr = 16 << BITS
    LEVELS: tl.constexpr = 2 * BUCKETS
    rank = tl.program_id(0)
    level = tl.arange(0, LEVELS)
    limit = tl.load(limits + rank * 4)
    first = tl.load(limits + rank * 4 + 1)
    end = LEVELS
    if PROTECT_TEXT:
        end = tl.where(first == 0, BUCKETS, LEVELS)  # all text stays
    units = tl.load(levels + rank * LEVELS + level)
    units = tl.where((level >= first) & (level < end), units, 0)
    at = cut_level(units, level, limit, first)
    quota = tl.where(at >= first, limit - tl.sum(tl.where(level > at, units, 0)), 0)
    tl.store(cut + rank * 4, tl.where(limit < 0, -1, at))
    tl.store(cut + rank * 4 + 1, tl.where(limit < 0, 0, quota))
    tl.store(cut + rank * 4 + 2, tl.load(limits + rank * 4 + 2))
    tl.store(cut + rank * 4 + 3, tl.load(limits + rank * 4 + 3))


def replica_choose(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    group: Tensor,
    shift: Tensor,
    quota: Tensor,
    limits: Tensor,
    policy: list[float],
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    p, placed = read(policy, places, topk_ids)
    checks.assignments(topk_ids, topk_weights, weight, segment)
    checks.chooses(topk_ids, group, shift, quota, limits, p, placed.num_physical)
    ids, gates, weight, segment = (t.contiguous() for t in (topk_ids, topk_weights, weight, segment))
    shift, quota, limits = shift.contiguous(), quota.contiguous(), limits.contiguous()
    exchanged = group.contiguous()[checks.histogram_size(p) :]
    num_slots, top_k, redundant = ids.numel(), ids.size(1), placed.num_redundant
    num_blocks = triton.cdiv(num_slots, BLOCK)
    blocks = (num_blocks,)

    totals, base = quota.new_zeros(2 * redundant, num_blocks), quota.new_empty(2 * redundant, num_blocks)
    rows, levels = quota.new_empty(redundant), quota.new_zeros(p.num_ranks, 2 * p.buckets)
    chosen, cut = torch.empty_like(ids), torch.empty_like(limits)
    _count_rows_kernel[blocks](ids, segment, placed.logical, placed.row, totals, num_slots, num_blocks, top_k, BLOCK)
    _number_kernel[(2 * redundant,)](
        exchanged, placed.head, totals, base, rows, num_blocks,
        p.num_ranks, redundant, triton.next_power_of_2(p.num_ranks), PREFIX_BLOCK,
    )  # fmt: skip
    _choose_kernel[blocks](
        ids, gates, weight, segment, shift, quota, limits,
        placed.logical, placed.first, placed.rank, placed.physical, placed.row, base, rows,
        chosen, levels, num_slots, num_blocks, top_k, p.bucket_bits, p.importance, p.protect_text, BLOCK,
    )  # fmt: skip
    _own_cut_kernel[(p.num_ranks,)](limits, levels, cut, p.bucket_bits, p.protect_text)
    return chosen, cut

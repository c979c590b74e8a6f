"""load_histogram (docs/design/method.md 3, 3b): integer atomics, the same sums in any order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .level import bucket_of, fixed_weight, importance_of, load_assignments, load_units, logical_of
from .places import read_optional

SLOT_BLOCK = 512


@triton.jit(do_not_specialize=["num_tokens"])
def _histogram_kernel(
    ids, gates, weight, segment, histogram, num_tokens, head, logical, row,
    NUM_EXPERTS: tl.constexpr, NUM_RANKS: tl.constexpr, NUM_PHYSICAL: tl.constexpr, TOP_K: tl.constexpr,
    BITS: tl.constexpr, EFFECTIVE: tl.constexpr, IMPORTANCE: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Cells, sums, and with places what lies behind: rows by rank as routed, own rows of each replicated expert."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    inside = (token < num_tokens) & (slot < TOP_K)
    routed, gate, w, text = load_assignments(token * TOP_K + slot, inside, ids, gates, weight, segment, TOP_K)
    expert = logical_of(routed, logical)
    used = expert >= 0
    bucket = bucket_of(importance_of(w, gate, IMPORTANCE), BITS)
    cell = (expert * 2 + text.to(tl.int32)) * (16 << BITS) + bucket
    tl.atomic_add(histogram + cell, load_units(w, EFFECTIVE), mask=used, sem="relaxed")

    rows = tl.sum(used.to(tl.int32), 1)
    visual = tl.max((used & (text == 0)).to(tl.int32), 1)
    fixed = tl.max(tl.where(used, fixed_weight(w), 0), 1)  # 0 for padding
    sums = histogram + NUM_EXPERTS * 2 * (16 << BITS)
    tl.atomic_add(sums, tl.sum(rows), sem="relaxed")
    tl.atomic_add(sums + 1, tl.sum(rows * visual), sem="relaxed")
    tl.atomic_add(sums + 2, tl.sum(fixed * visual), sem="relaxed")
    tl.atomic_add(sums + 3, tl.sum(fixed), sem="relaxed")

    if logical is not None:
        of_rank = sums + 4
        one = tl.full(expert.shape, 1, tl.int32)
        tl.atomic_add(of_rank + routed // (NUM_PHYSICAL // NUM_RANKS), one, mask=used, sem="relaxed")
        of_expert = tl.load(row + expert, mask=used, other=-1)
        mine = of_rank + NUM_RANKS + tl.load(head) * (2 * (NUM_PHYSICAL - NUM_EXPERTS))
        tl.atomic_add(mine + 2 * of_expert + 1 - text.to(tl.int32), one, mask=of_expert >= 0, sem="relaxed")


def load_histogram(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    policy: list[float],
    places: Tensor | None = None,
) -> Tensor:
    p, placed = read_optional(policy, places, topk_ids)
    checks.assignments(topk_ids, topk_weights, weight, segment)
    inputs = [t.contiguous() for t in (topk_ids, topk_weights, weight, segment)]
    num_tokens, top_k = topk_ids.shape
    size = checks.exchange_size(p, placed.num_physical) if placed else checks.histogram_size(p)
    histogram = torch.zeros(size, dtype=torch.int32, device=topk_ids.device)
    slots = triton.next_power_of_2(top_k)
    tokens = max(1, SLOT_BLOCK // slots)
    _histogram_kernel[(triton.cdiv(num_tokens, tokens),)](
        *inputs, histogram, num_tokens, *((placed.head, placed.logical, placed.row) if placed else (None, None, None)),
        p.num_experts, p.num_ranks, placed.num_physical if placed else p.num_experts, top_k,
        p.bucket_bits, p.load == 1, p.importance, tokens, slots,
    )  # fmt: skip
    return histogram

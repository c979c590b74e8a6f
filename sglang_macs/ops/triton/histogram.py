"""load_histogram (docs/design/method.md 3): integer atomics, the same sums in any order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..policy import unpack
from . import checks
from .level import bucket_of, fixed_weight, importance_of, load_assignments, load_units

SLOT_BLOCK = 512


@triton.jit(do_not_specialize=["num_tokens"])
def _histogram_kernel(
    ids, gates, weight, segment, histogram, num_tokens,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BITS: tl.constexpr, EFFECTIVE: tl.constexpr,
    IMPORTANCE: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    inside = (token < num_tokens) & (slot < TOP_K)
    expert, gate, w, text = load_assignments(token * TOP_K + slot, inside, ids, gates, weight, segment, TOP_K)
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


def load_histogram(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    policy: list[float],
) -> Tensor:
    p = unpack(policy)
    checks.assignments(topk_ids, topk_weights, weight, segment)
    inputs = [t.contiguous() for t in (topk_ids, topk_weights, weight, segment)]
    num_tokens, top_k = topk_ids.shape
    histogram = torch.zeros(checks.histogram_size(p), dtype=torch.int32, device=topk_ids.device)
    slots = triton.next_power_of_2(top_k)
    tokens = max(1, SLOT_BLOCK // slots)
    _histogram_kernel[(triton.cdiv(num_tokens, tokens),)](
        *inputs, histogram, num_tokens, p.num_experts, top_k, p.bucket_bits, p.load == 1, p.importance, tokens, slots
    )
    return histogram

"""entropy_score and entropy_weight (docs/design/method.md 1, 2)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

ROW_BLOCK = 8192  # features a program holds at once; a wider row takes several steps
TOKEN_BLOCK = 4096
LOWEST = tl.constexpr(-200.0)  # e^-200 is 0 in f32; a difference of -inf would make 0 * inf


@triton.jit
def _score_kernel(hidden_states, segment, entropy, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: Z = sum e^d and S = sum d e^d beside a running maximum, to which both are relative."""
    row = tl.program_id(0)
    score = 0.0
    if tl.load(segment + row) >= 0:
        top = float("-inf")
        z = 0.0
        s = 0.0
        features = hidden_states + row.to(tl.int64) * HIDDEN
        for start in range(0, HIDDEN, BLOCK):
            feature = start + tl.arange(0, BLOCK)
            x = tl.load(features + feature, mask=feature < HIDDEN, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(x))
            below = tl.maximum(top - new_top, LOWEST)
            d = tl.maximum(x - new_top, LOWEST)
            e = tl.exp(d)
            s = tl.exp(below) * (s + below * z) + tl.sum(e * d)
            z = tl.exp(below) * z + tl.sum(e)
            top = new_top
        score = tl.log(z) - s / z
    tl.store(entropy + row, score)


@triton.jit(do_not_specialize=["num_tokens"])
def _weight_kernel(entropy, segment, weight, num_tokens, delta, BLOCK: tl.constexpr):
    """One program per segment, three passes over all tokens in double: mean, deviation, weights of its own tokens.

    Lanes add up in token order and are reduced once, in a fixed order: the same bits every time.
    """
    own = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mine = tl.load(segment + token, mask=token < num_tokens, other=-1) == own
        total += tl.load(entropy + token, mask=mine, other=0.0).to(tl.float64)
        count += mine.to(tl.int32)
    tokens = tl.maximum(tl.sum(count), 1).to(tl.float64)
    mean = tl.sum(total) / tokens
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mine = tl.load(segment + token, mask=token < num_tokens, other=-1) == own
        d = tl.load(entropy + token, mask=mine, other=0.0).to(tl.float64) - mean
        squares += tl.where(mine, d * d, 0.0)
    spread = tl.sqrt(tl.sum(squares) / tokens) + 1e-6
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mine = tl.load(segment + token, mask=token < num_tokens, other=-1) == own
        z = (tl.load(entropy + token, mask=mine, other=0.0).to(tl.float64) - mean) / spread
        w = 1.0 / (1.0 + tl.exp(z * delta))
        tl.store(weight + token, w.to(tl.float32), mask=mine)


def entropy_score(hidden_states: Tensor, segment: Tensor) -> Tensor:
    checks.hidden_states(hidden_states, segment)
    x, segment = hidden_states.contiguous(), segment.contiguous()
    num_tokens, hidden_size = x.shape
    entropy = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(hidden_size), ROW_BLOCK)
    _score_kernel[(num_tokens,)](x, segment, entropy, hidden_size, block, num_warps=8 if block > 2048 else 4)
    return entropy


def entropy_weight(entropy: Tensor, segment: Tensor, num_segments: int, delta: float) -> Tensor:
    checks.entropies(entropy, segment, num_segments)
    entropy, segment = entropy.contiguous(), segment.contiguous()
    weight = torch.ones_like(entropy)
    _weight_kernel[(num_segments,)](entropy, segment, weight, entropy.numel(), delta, TOKEN_BLOCK, num_warps=16)
    return weight

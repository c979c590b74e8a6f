"""What csrc/torch_ops.cpp checks, for the operators that do not pass through it: ValueError with got and expected."""

import math

import torch
from torch import Tensor

from ..errors import MacsError

HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _require(holds: bool, what: str, got: object, expected: str) -> None:
    if not holds:
        raise MacsError(what, got, expected)


def _like(x: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], beside: Tensor) -> None:
    _require(x.dtype == dtype, name, f"dtype {x.dtype}", str(dtype))
    _require(x.shape == shape, name, f"shape {list(x.shape)}", str(list(shape)))
    _require(x.device == beside.device, name, f"device {x.device}", str(beside.device))


def _choice(value: int, count: int, name: str) -> None:
    _require(0 <= value < count, name, value, f"0 to {count - 1}")


def _ranks(num_experts: int, num_ranks: int) -> None:
    holds = num_experts > 0 and num_ranks > 0 and num_experts % num_ranks == 0
    _require(holds, "num_ranks", f"{num_ranks} for {num_experts} experts", "a divisor of the number of experts")


def bucket_bits(buckets: int) -> int:
    """m of B = 2^(4 + m)."""
    _require(buckets in (32, 64, 128, 256), "buckets", buckets, "32, 64, 128 or 256")
    return buckets.bit_length() - 5


def histogram_size(num_experts: int, buckets: int) -> int:
    """Entries of a histogram: cells and the four sums."""
    return num_experts * 2 * buckets + 4


def hidden_states(x: Tensor, segment: Tensor) -> None:
    _require(x.dim() == 2 and x.size(1) > 0, "hidden_states", f"shape {list(x.shape)}", "[T, H] with H > 0")
    _require(x.dtype in HIDDEN_DTYPES, "hidden_states", f"dtype {x.dtype}", "bfloat16, float16 or float32")
    _like(segment, "segment", torch.int32, (x.size(0),), x)


def entropies(entropy: Tensor, segment: Tensor, num_segments: int) -> None:
    _require(num_segments >= 0, "num_segments", num_segments, "at least 0")
    _require(entropy.dim() == 1, "entropy", f"shape {list(entropy.shape)}", "[T]")
    _like(entropy, "entropy", torch.float32, entropy.shape, entropy)
    _like(segment, "segment", torch.int32, entropy.shape, entropy)


def assignments(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    num_experts: int,
    load: int,
    importance: int,
) -> None:
    _require(topk_ids.dim() == 2, "topk_ids", f"shape {list(topk_ids.shape)}", "[T, K]")
    is_integer = topk_ids.dtype in (torch.int32, torch.int64)
    _require(is_integer, "topk_ids", f"dtype {topk_ids.dtype}", "int32 or int64")
    _like(topk_weights, "topk_weights", torch.float32, topk_ids.shape, topk_ids)
    _like(weight, "weight", torch.float32, topk_ids.shape[:1], topk_ids)
    _like(segment, "segment", torch.int32, topk_ids.shape[:1], topk_ids)
    _require(num_experts > 0, "num_experts", num_experts, "at least 1")
    _choice(load, 2, "load")
    _choice(importance, 3, "importance")


def thresholds(
    own: Tensor,
    group: Tensor,
    modality: Tensor,
    num_ranks: int,
    buckets: int,
    scope: int,
    load: int,
    reroute: int,
    gamma: float,
    rho: float,
    alpha: float,
    c_min: float,
) -> None:
    _ranks(modality.numel(), num_ranks)
    _like(own, "own", torch.int32, (histogram_size(modality.numel(), buckets),), own)
    _like(group, "group", torch.int32, own.shape, own)
    _like(modality, "modality", torch.int8, (modality.numel(),), own)
    _choice(scope, 2, "scope")
    _choice(load, 2, "load")
    _choice(reroute, 3, "reroute")
    _require(gamma > 0, "gamma", gamma, "a number above 0")
    _require(0 <= rho < 2, "rho", rho, "0 <= rho < 2")
    _require(0 <= alpha <= 16, "alpha", alpha, "0 <= alpha <= 16")
    _require(c_min >= 0 and math.isfinite(c_min), "c_min", c_min, "a finite number >= 0")


def clips(
    topk_ids: Tensor,
    router_logits: Tensor | None,
    shift: Tensor,
    cut: Tensor,
    num_ranks: int,
    scope: int,
    reroute: int,
    scoring: int,
) -> None:
    num_experts = shift.numel()
    _ranks(num_experts, num_ranks)
    _choice(scope, 2, "scope")
    _choice(reroute, 3, "reroute")
    _choice(scoring, 2, "scoring")
    _like(shift, "shift", torch.int32, (num_experts,), topk_ids)
    _like(cut, "cut", torch.int32, (num_ranks if scope == 1 else num_experts, 4), topk_ids)
    if router_logits is not None:
        _like(router_logits, "router_logits", torch.float32, (topk_ids.size(0), num_experts), topk_ids)

"""What csrc/torch/checks.h checks, for the operators that do not pass through it: ValueError with got and expected."""

from types import SimpleNamespace

import torch
from torch import Tensor

from ...choices import NUM_SUMS
from ...errors import MacsError

HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _require(holds: bool, what: str, got: object, expected: str) -> None:
    if not holds:
        raise MacsError(what, got, expected)


def _like(x: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], beside: Tensor) -> None:
    _require(x.dtype == dtype, name, f"dtype {x.dtype}", str(dtype))
    _require(x.shape == shape, name, f"shape {list(x.shape)}", str(list(shape)))
    _require(x.device == beside.device, name, f"device {x.device}", str(beside.device))


def histogram_size(policy: SimpleNamespace) -> int:
    """Entries of a histogram: cells and the sums."""
    return policy.num_experts * 2 * policy.buckets + NUM_SUMS


def exchange_size(policy: SimpleNamespace, num_physical: int) -> int:
    """Entries of a histogram with what lies behind it where there are places."""
    return histogram_size(policy) + policy.num_ranks * (1 + 2 * (num_physical - policy.num_experts))


def tables(table: Tensor, beside: Tensor) -> int:
    """Physical experts of a layer's tables."""
    size = table.numel()
    _require(size > 4 and size % 5 == 4, "places", f"{size} numbers", "the tables of a layer")
    _like(table, "places", torch.int32, (size,), beside)
    return (size - 4) // 5


def goes_with_places(policy: SimpleNamespace, num_physical: int) -> None:
    """Whether plans may choose replicas by these options."""
    fits = policy.scope == 1 and policy.load == 0 and policy.reroute != 1
    _require(fits, "policy", "another scope, load or reroute", "rank, rows, none or global with places")
    got = f"{num_physical} physical experts"
    _require(num_physical >= policy.num_experts, "places", got, f"at least {policy.num_experts}")


def hidden_states(x: Tensor, segment: Tensor) -> None:
    _require(x.dim() == 2 and x.size(1) > 0, "hidden_states", f"shape {list(x.shape)}", "[T, H] with H > 0")
    _require(x.dtype in HIDDEN_DTYPES, "hidden_states", f"dtype {x.dtype}", "bfloat16, float16 or float32")
    _like(segment, "segment", torch.int32, (x.size(0),), x)


def entropies(entropy: Tensor, segment: Tensor, num_segments: int) -> None:
    _require(num_segments >= 0, "num_segments", num_segments, "at least 0")
    _require(entropy.dim() == 1, "entropy", f"shape {list(entropy.shape)}", "[T]")
    _like(entropy, "entropy", torch.float32, entropy.shape, entropy)
    _like(segment, "segment", torch.int32, entropy.shape, entropy)


def assignments(topk_ids: Tensor, topk_weights: Tensor, weight: Tensor, segment: Tensor) -> None:
    _require(topk_ids.dim() == 2, "topk_ids", f"shape {list(topk_ids.shape)}", "[T, K]")
    is_integer = topk_ids.dtype in (torch.int32, torch.int64)
    _require(is_integer, "topk_ids", f"dtype {topk_ids.dtype}", "int32 or int64")
    _like(topk_weights, "topk_weights", torch.float32, topk_ids.shape, topk_ids)
    _like(weight, "weight", torch.float32, topk_ids.shape[:1], topk_ids)
    _like(segment, "segment", torch.int32, topk_ids.shape[:1], topk_ids)


def thresholds(own: Tensor, group: Tensor, modality: Tensor, policy: SimpleNamespace, size: int) -> None:
    """size: of the histograms, with what lies behind."""
    _like(own, "own", torch.int32, (size,), own)
    _like(group, "group", torch.int32, own.shape, own)
    _like(modality, "modality", torch.int8, (policy.num_experts,), own)


def selects(router_logits: Tensor, correction_bias: Tensor | None, num_groups: int, topk_groups: int) -> None:
    shape = f"shape {list(router_logits.shape)}"
    _require(router_logits.dim() == 2 and router_logits.size(1) > 0, "router_logits", shape, "[T, E] with E > 0")
    is_float = router_logits.dtype in HIDDEN_DTYPES
    _require(is_float, "router_logits", f"dtype {router_logits.dtype}", "bfloat16, float16 or float32")
    experts = router_logits.size(1)
    whole = num_groups > 0 and experts % num_groups == 0
    _require(whole, "num_groups", f"{num_groups} of {experts} experts", "a divisor of the number of experts")
    _require(0 < topk_groups <= num_groups, "topk_groups", topk_groups, f"1 to {num_groups}")
    if correction_bias is not None:
        _like(correction_bias, "correction_bias", torch.float32, (experts,), router_logits)
        enough = topk_groups == num_groups or experts >= 2 * num_groups
        got = f"{num_groups} of {experts} experts"
        _require(enough, "num_groups", got, "two experts each where they are ranked with a bias")


def chooses(
    topk_ids: Tensor,
    group: Tensor,
    shift: Tensor,
    quota: Tensor,
    limits: Tensor,
    policy: SimpleNamespace,
    num_physical: int,
) -> None:
    _like(group, "group", torch.int32, (exchange_size(policy, num_physical),), topk_ids)
    _like(shift, "shift", torch.int32, (policy.num_experts,), topk_ids)
    _like(quota, "quota", torch.int32, (num_physical,), topk_ids)
    _like(limits, "limits", torch.int32, (policy.num_ranks, 4), topk_ids)


def chosen_ids(topk_ids: Tensor, chosen: Tensor | None, placed: bool) -> None:
    _require(placed == (chosen is not None), "chosen", "one without the other", "with places, and only then")
    if chosen is not None:
        _like(chosen, "chosen", topk_ids.dtype, topk_ids.shape, topk_ids)


def clips(
    topk_ids: Tensor,
    router_logits: Tensor | None,
    shift: Tensor,
    cut: Tensor,
    policy: SimpleNamespace,
    selection: Tensor | None = None,
) -> None:
    num_experts = policy.num_experts
    _like(shift, "shift", torch.int32, (num_experts,), topk_ids)
    _like(cut, "cut", torch.int32, (policy.num_ranks if policy.scope == 1 else num_experts, 4), topk_ids)
    if router_logits is not None:
        _like(router_logits, "router_logits", torch.float32, (topk_ids.size(0), num_experts), topk_ids)
    if selection is not None:
        _like(selection, "selection", torch.float32, (topk_ids.size(0), num_experts), topk_ids)

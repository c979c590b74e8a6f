"""The bounded permutation's launchers through ctypes, with the arguments of `sglang_macs.ops`: for benchmarks/gpu and
the emulated tests. `call(name, params)` runs a launcher (kernels_c.py, tests/support/emulated.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from torch import Tensor

from .policy_c import strict

Call = Callable[[str, ctypes.Structure], None]
_p, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


# csrc/include/macs/bounded.h, field by field; macs_bounded_sizeof checks the layout.
@strict
class PermuteParams(ctypes.Structure):
    _fields_ = [
        *_fields(_p, "topk_ids", "tokens", "scales", "place", "expert_end", "rows", "row_scales"),
        *_fields(_p, "counts", "lost"),
        *_fields(_i64, "num_tokens", "max_rows", "row_bytes"),
        *_fields(_i32, "top_k", "num_experts", "num_scales", "tile"),
    ]


@strict
class GatherParams(ctypes.Structure):
    _fields_ = [
        *_fields(_p, "outputs", "place", "weights", "tokens"),
        *_fields(_i64, "num_tokens", "max_rows", "hidden_size"),
        ("top_k", _i32),
    ]


STRUCTS = (PermuteParams, GatherParams)


def permute_params(
    topk_ids: Tensor,
    tokens: Tensor,
    scales: Tensor | None,
    num_experts: int,
    tile: int,
    place: Tensor,
    expert_end: Tensor,
    rows: Tensor,
    row_scales: Tensor | None,
    workspace: Tensor,
    lost: Tensor,
) -> PermuteParams:
    """As `ops.bounded_permute`; the tensors must outlive what is made of it."""
    given = (topk_ids, tokens, scales, place, expert_end, rows, row_scales, workspace, lost)
    sizes = (len(topk_ids), len(rows), rows.shape[1] * rows.element_size())
    num_scales = 0 if scales is None else scales.shape[1]
    return PermuteParams(*map(_address, given), *sizes, topk_ids.shape[1], num_experts, num_scales, tile)


def gather_params(outputs: Tensor, place: Tensor, weights: Tensor, tokens: Tensor) -> GatherParams:
    """As `ops.bounded_gather`; the tensors must outlive what is made of it."""
    given = (outputs, place, weights, tokens)
    return GatherParams(*map(_address, given), len(place), *outputs.shape, place.shape[1])


def operators(call: Call) -> tuple[Callable[..., None], Callable[..., None]]:
    """(bounded_permute, bounded_gather) by these launchers."""

    def permute(*arguments, **named) -> None:
        call("bounded_permute", permute_params(*arguments, **named))

    def gather(*arguments) -> None:
        call("bounded_gather", gather_params(*arguments))

    return permute, gather


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

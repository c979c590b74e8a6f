"""The structures of csrc/include/macs/fused.h, field by field; `check_sizes` compares them with the library's.

The library is any that has the C interface of csrc/cuda/capi.cu: nvcc's or the emulator's.
"""

from __future__ import annotations

import ctypes

from .policy_c import Policy, choices, strict

FORMATS = ("bfloat16", *choices.FORMATS[1:])  # by the names of the result files
BOTH, SEND, RECEIVE = range(len(choices.PHASES))
FAULTS = choices.FAULTS
MAX_PEERS = 16

_p, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_u64, _u32, _bool = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_bool


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


@strict
class FusedStatus(ctypes.Structure):
    _fields_ = [
        *_fields(_i32, "fault peer block layer"),
        *_fields(_u32, "epoch limit_ms"),
        *_fields(_i64, "seen expected"),
    ]


@strict
class FusedShape(ctypes.Structure):
    _fields_ = _fields(
        _i32, "num_ranks num_experts top_k max_tokens hidden_size num_blocks format expert_rows max_rows alignment"
    )


@strict
class FusedLayout(ctypes.Structure):
    _fields_ = _fields(
        _i64,
        "flags tokens entries weighed weights counts rows row_scales scales outputs sources barrier entropy cuts wanted"
        " positions received starts epoch stamps status bytes",
    )


@strict
class FusedRank(ctypes.Structure):
    _fields_ = [
        ("region", _p * MAX_PEERS),
        *_fields(_p, "hidden_states topk_ids topk_weights segment router_logits new_ids new_weights weight counts cut"),
        *_fields(_p, "sums row_experts outputs combined"),
        *_fields(_i32, "num_tokens rank"),
    ]


@strict
class FusedDispatchParams(ctypes.Structure):
    _fields_ = [
        ("shape", FusedShape),
        ("layout", FusedLayout),
        ("modality", _p),
        ("policy", Policy),
        ("num_segments", _i32),
        *_fields(_bool, "ids_are_i64 same_device scales_with_rows names_sources"),
        *_fields(_i32, "phase layer"),
        ("timeout_ns", _u64),
        ("one", FusedRank),
        ("many", _p),
        ("launched", _i32),
    ]


@strict
class FusedCombineParams(ctypes.Structure):
    _fields_ = [
        ("shape", FusedShape),
        ("layout", FusedLayout),
        ("one", FusedRank),
        ("many", _p),
        *_fields(_bool, "ids_are_i64 same_device"),
        *_fields(_i32, "phase layer"),
        ("timeout_ns", _u64),
        ("launched", _i32),
    ]


STRUCTS = (FusedStatus, FusedShape, FusedLayout, FusedRank, FusedDispatchParams, FusedCombineParams)


def check_sizes(library: ctypes.CDLL) -> None:
    """Raises RuntimeError where a structure here is not the library's."""
    library.macs_fused_sizeof.restype = ctypes.c_size_t
    for i, struct in enumerate(STRUCTS):
        size = library.macs_fused_sizeof(i)
        if size != ctypes.sizeof(struct):
            raise RuntimeError(f"{struct.__name__}: {size} bytes in C, {ctypes.sizeof(struct)} here")


def layout_of(library: ctypes.CDLL, shape: FusedShape) -> FusedLayout:
    """Byte offsets into a rank's region."""
    layout = FusedLayout()
    library.macs_fused_layout(ctypes.byref(shape), ctypes.byref(layout))
    return layout

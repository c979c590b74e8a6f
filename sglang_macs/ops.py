"""The five operators of the plan (docs/method.md) and, on CUDA, its two fused halves, as thin wrappers over
`torch.ops.sglang_macs`.

Every operator exists for CPU, CUDA and Meta under one name. For CUDA it is the extension's kernel or, where that was
built without nvcc, the one of triton_ops; MACS_CUDA_BACKEND=cuda or =triton in the environment insists on one of them.
Choices are strings here and integers in the schema. All of them raise ValueError on a wrong shape, dtype, device or
choice.
"""

import glob
import importlib.util
import os

import torch
from torch import Tensor

from .errors import MacsError

SCOPES = ("expert", "rank")
LOADS = ("rows", "effective")
IMPORTANCES = ("entropy", "gate", "entropy_gate")
REROUTES = ("none", "local", "global")
SCORINGS = ("softmax", "sigmoid")
BUCKETS = (32, 64, 128, 256)
WEIGHT_ONE = 256  # fixed-point 1.0 of an entropy weight, and the units of one row under load=effective
NUM_SUMS = 4  # N, N_visual, W_visual, W behind the histogram's [E, 2, B] cells


def _load_library() -> None:
    here = os.path.dirname(__file__)
    found = glob.glob(os.path.join(here, "_C*.so"))
    if not found:
        raise MacsError("sglang_macs._C", "no built extension", f"_C*.so in {here}", "Build it: make build")
    torch.ops.load_library(found[0])


_load_library()
_ops = torch.ops.sglang_macs


def _choose_cuda_backend() -> str | None:
    built = torch._C._dispatch_has_kernel_for_dispatch_key("sglang_macs::clip_apply", "CUDA")
    usual = "cuda" if built else "triton" if torch.version.cuda and importlib.util.find_spec("triton") else None
    backend = os.environ.get("MACS_CUDA_BACKEND") or usual
    if backend == "cuda" and not built:
        raise MacsError("MACS_CUDA_BACKEND", "cuda", "triton: this build has no CUDA kernels", "Or build with nvcc.")
    if backend not in ("cuda", "triton", None):
        raise MacsError("MACS_CUDA_BACKEND", backend, "cuda or triton")
    return backend


_cuda_backend = _choose_cuda_backend()
if _cuda_backend == "triton":
    from . import triton_ops

    _triton_library = triton_ops.register("CUDA")


def cuda_backend() -> str | None:
    """Whose operators CUDA tensors get: "cuda" (the extension's kernels), "triton" or None."""
    return _cuda_backend


def has_cuda() -> bool:
    """Whether the operators take CUDA tensors."""
    return _cuda_backend is not None


def is_fused(tensor: Tensor) -> bool:
    """Whether `score_histogram` and `threshold_apply` exist where `tensor` is: in the extension's CUDA kernels."""
    return tensor.is_cuda and _cuda_backend == "cuda"


def choice(name: str, value: str, choices: tuple[str, ...]) -> int:
    """Index of `value` in `choices`; MacsError names the field and what it takes."""
    if value not in choices:
        raise MacsError(name, repr(value), f"one of {', '.join(choices)}")
    return choices.index(value)


def entropy_score(hidden_states: Tensor, segment: Tensor) -> Tensor:
    """Entropy of softmax over each visual token's features.

    Args:
        hidden_states: [T, H] bf16, f16 or f32, the MoE layer's input.
        segment: [T] i32, -1 = text.
    Returns:
        [T] f32, nats; 0 for text.
    Source: MACS section 3; docs/method.md 1.
    """
    return _ops.entropy_score(hidden_states, segment)


def entropy_weight(entropy: Tensor, segment: Tensor, num_segments: int, delta: float) -> Tensor:
    """`sigmoid(-delta * z)` of the entropies within each segment; 1 for text.

    Args:
        entropy: [T] f32, nats.
        segment: [T] i32 below `num_segments`, -1 = text.
        delta: steepness, unitless; 0 weighs every visual token 0.5.
    Returns:
        [T] f32 in (0, 1].
    Source: MACS section 3; docs/method.md 2.
    """
    return _ops.entropy_weight(entropy, segment, num_segments, delta)


def load_histogram(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    *,
    num_experts: int,
    buckets: int,
    load: str,
    importance: str,
) -> Tensor:
    """Integer units of load per (expert, modality, importance bucket), and the sums behind R_v.

    Args:
        topk_ids: [T, K] i32 or i64, -1 = empty slot.
        topk_weights: [T, K] f32.
        weight: [T] f32 of `entropy_weight`.
        segment: [T] i32, -1 = text.
    Returns:
        [num_experts * 2 * buckets + 4] i32; ranks add theirs up elementwise.
    Source: docs/method.md 3.
    """
    return _ops.load_histogram(
        topk_ids,
        topk_weights,
        weight,
        segment,
        num_experts,
        buckets,
        choice("load", load, LOADS),
        choice("importance", importance, IMPORTANCES),
    )


def clip_threshold(
    own: Tensor,
    group: Tensor,
    modality: Tensor,
    *,
    num_ranks: int,
    buckets: int,
    scope: str,
    load: str,
    reroute: str,
    protect_text: bool,
    gamma: float,
    rho: float,
    alpha: float,
    c_min: float,
) -> tuple[Tensor, Tensor]:
    """The level at which each bound cuts, and this rank's shares.

    Args:
        own, group: histograms of this rank and of the EP group.
        modality: [E] i8, -1 text expert, 0 shared, +1 visual.
        gamma: capacity over the mean load; `inf` = no bound.
        c_min: rows per expert that capacity never falls below.
    Returns:
        shift [E] i32, the buckets an overloaded expert's assignments move down by; and
        cut [NB, 4] i32: level, quota (units), room (units), bound (units). NB = E or num_ranks, by scope.
    Source: docs/method.md 4.
    """
    return _ops.clip_threshold(
        own,
        group,
        modality,
        num_ranks,
        buckets,
        choice("scope", scope, SCOPES),
        choice("load", load, LOADS),
        choice("reroute", reroute, REROUTES),
        protect_text,
        gamma,
        rho,
        alpha,
        c_min,
    )


def clip_apply(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    router_logits: Tensor | None,
    shift: Tensor,
    cut: Tensor,
    *,
    num_ranks: int,
    buckets: int,
    scope: str,
    load: str,
    importance: str,
    reroute: str,
    protect_text: bool,
    reroute_rounds: int,
    scoring: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clip what lies below the cut, re-route what finds room, drop the rest.

    Args:
        router_logits: [T, E] f32, or None: nothing is re-routed.
        shift, cut: of `clip_threshold`.
    Returns:
        New topk_ids and topk_weights (dropped slots are -1 and 0.0), and counts [3, E, 2] i32: kept, clipped,
        re-routed in, by (expert, visual | text).
    Source: docs/method.md 5; the -1 convention is DeepEP's.
    """
    return _ops.clip_apply(
        topk_ids,
        topk_weights,
        weight,
        segment,
        router_logits,
        shift,
        cut,
        num_ranks,
        buckets,
        choice("scope", scope, SCOPES),
        choice("load", load, LOADS),
        choice("importance", importance, IMPORTANCES),
        choice("reroute", reroute, REROUTES),
        protect_text,
        reroute_rounds,
        choice("scoring", scoring, SCORINGS),
    )


def score_histogram(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    segment: Tensor,
    *,
    num_segments: int,
    delta: float,
    num_experts: int,
    num_ranks: int,
    buckets: int,
    scope: str,
    load: str,
    importance: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`entropy_score`, `entropy_weight` and `load_histogram` in one chain of overlapping launches: the plan before its
    exchange, the same bits as the three operators. Only where `is_fused`.

    Args: theirs; num_ranks and scope only size the workspace.
    Returns:
        weight [T] f32; the histogram; and a workspace for `threshold_apply`.
    """
    return _ops.score_histogram(
        hidden_states,
        topk_ids,
        topk_weights,
        segment,
        num_segments,
        delta,
        num_experts,
        num_ranks,
        buckets,
        choice("scope", scope, SCOPES),
        choice("load", load, LOADS),
        choice("importance", importance, IMPORTANCES),
    )


def threshold_apply(
    own: Tensor,
    group: Tensor,
    modality: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    router_logits: Tensor | None,
    workspace: Tensor | None,
    *,
    num_ranks: int,
    buckets: int,
    scope: str,
    load: str,
    importance: str,
    reroute: str,
    protect_text: bool,
    gamma: float,
    rho: float,
    alpha: float,
    c_min: float,
    reroute_rounds: int,
    scoring: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`clip_threshold` and `clip_apply` in one kernel, the same bits: the plan behind its exchange.
    Only where `is_fused`.

    Args: theirs; workspace: of the `score_histogram` of the same batch, or None.
    Returns:
        topk_ids, topk_weights, shift, cut, counts.
    """
    return _ops.threshold_apply(
        own,
        group,
        modality,
        topk_ids,
        topk_weights,
        weight,
        segment,
        router_logits,
        workspace,
        num_ranks,
        buckets,
        choice("scope", scope, SCOPES),
        choice("load", load, LOADS),
        choice("importance", importance, IMPORTANCES),
        choice("reroute", reroute, REROUTES),
        protect_text,
        gamma,
        rho,
        alpha,
        c_min,
        reroute_rounds,
        choice("scoring", scoring, SCORINGS),
    )

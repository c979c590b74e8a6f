"""The operators of the plan (docs/design/method.md), and the plan in one call or two, as thin wrappers over
`torch.ops.sglang_macs`.

Every operator exists for CPU, CUDA and Meta under one name. For CUDA it is the extension's kernel or, where that was
built without nvcc, the one of triton/; MACS_CUDA_BACKEND=cuda or =triton in the environment insists on one of them.
`policy` holds the options of a plan (policy.py). They raise ValueError on a wrong shape, dtype, device or option.
"""

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..choices import PHASES, SCORINGS
from ..errors import MacsError
from . import definitions
from .policy import Policy, choice


def _load_library() -> None:
    """Registers the operators of the extension. Raises MacsError."""
    library = extension.library_in(extension.PACKAGE)
    if library is None:
        raise extension.missing(extension.PACKAGE)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # built against another torch
        why = str(error).strip().splitlines()[-1]
        raise MacsError(
            extension.NAME, why, f"a build for torch {torch.__version__}", "Build it: make build"
        ) from error


def _choose_cuda_backend() -> str | None:
    built = torch._C._dispatch_has_kernel_for_dispatch_key("sglang_macs::clip_apply", "CUDA")
    usual = "cuda" if built else "triton" if torch.version.cuda and importlib.util.find_spec("triton") else None
    backend = os.environ.get("MACS_CUDA_BACKEND") or usual
    if backend == "cuda" and not built:
        raise MacsError("MACS_CUDA_BACKEND", "cuda", "triton: this build has no CUDA kernels", "Or build with nvcc.")
    if backend not in ("cuda", "triton", None):
        raise MacsError("MACS_CUDA_BACKEND", backend, "cuda or triton")
    return backend


class _Unavailable:
    """In place of the operators that could not be loaded: the first use of one says why."""

    def __init__(self, why: MacsError) -> None:
        self.why = why

    def __getattr__(self, operator: str):
        raise self.why


# An exception here would reach SGLang's loader of plugins, which swallows it, and the launch would end with a usage
# message that does not know `macs`. So it is kept, and raised by `check` and by every operator.
_cuda_backend: str | None = None
try:
    _load_library()
    definitions.check()
    _cuda_backend = _choose_cuda_backend()
    _ops = torch.ops.sglang_macs
except MacsError as error:
    _ops = _Unavailable(error)

if _cuda_backend == "triton":
    from . import triton as triton_ops

    _triton_library = triton_ops.register("CUDA")


def check() -> None:
    """Raises the MacsError that kept the operators from being loaded, if one did."""
    if isinstance(_ops, _Unavailable):
        raise _ops.why


def cuda_backend() -> str | None:
    """Whose operators CUDA tensors get: "cuda" (the extension's kernels), "triton" or None. Raises as `check`."""
    check()
    return _cuda_backend


def has_cuda() -> bool:
    """Whether the operators take CUDA tensors. Raises as `check`."""
    return cuda_backend() is not None


def is_whole(tensor: Tensor) -> bool:
    """Whether `plan`, `score_histogram` and `threshold_apply` exist where `tensor` is: not in Triton."""
    return not tensor.is_cuda or _cuda_backend == "cuda"


def entropy_score(hidden_states: Tensor, segment: Tensor) -> Tensor:
    """Entropy of softmax over each visual token's features.

    Args:
        hidden_states: [T, H] bf16, f16 or f32, the MoE layer's input.
        segment: [T] i32, -1 = text.
    Returns:
        [T] f32, nats; 0 for text.
    Source: MACS section 3; docs/design/method.md 1.
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
    Source: MACS section 3; docs/design/method.md 2.
    """
    return _ops.entropy_weight(entropy, segment, num_segments, delta)


def load_histogram(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    policy: Policy,
    places: Tensor | None = None,
) -> Tensor:
    """Integer units of load per (expert, modality, importance bucket), and the sums behind R_v.

    Args:
        topk_ids: [T, K] i32 or i64, -1 = empty slot.
        topk_weights: [T, K] f32.
        weight: [T] f32 of `entropy_weight`.
        segment: [T] i32, -1 = text.
        places: tables of `plan.places.Places`, or None: experts lie linearly. With them, ids are physical. On a CPU.
    Returns:
        [E * 2 * B + 4] i32; ranks add theirs up elementwise. With places, [R + R * X * 2] more lie behind.
    Source: docs/design/method.md 3, 3b.
    """
    if places is None:  # Triton's take no tables
        return _ops.load_histogram(topk_ids, topk_weights, weight, segment, policy)
    return _ops.load_histogram(topk_ids, topk_weights, weight, segment, policy, places)


def clip_threshold(own: Tensor, group: Tensor, modality: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """The level at which each bound cuts, and this rank's shares.

    Args:
        own, group: histograms of this rank and of the EP group.
        modality: [E] i8, -1 text expert, 0 shared, +1 visual.
    Returns:
        shift [E] i32, the buckets an overloaded expert's assignments move down by; and
        cut [NB, 4] i32: level, quota (units), room (units), bound (units). NB = E or num_ranks, by scope.
    Source: docs/design/method.md 4.
    """
    return _ops.clip_threshold(own, group, modality, policy)


def replica_balance(
    own: Tensor, group: Tensor, modality: Tensor, policy: Policy, places: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How many rows each replica gets, and what this rank may send where a bound is exceeded all the same. On a CPU.

    Args:
        own, group: of `load_histogram` with places, of this rank and summed over the EP group.
        modality: [E] i8.
    Returns:
        shift [E]; quota [P], rows of each place; load [R], rows of each rank; limits [R, 4]: rows that this rank may
        send of those that it counts (-1: all), first level counted, room, bound. All i32.
    Source: docs/design/method.md 3b, 4b.
    """
    return _ops.replica_balance(own, group, modality, policy, places)


def replica_choose(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    group: Tensor,
    shift: Tensor,
    quota: Tensor,
    limits: Tensor,
    policy: Policy,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    """Which replica each assignment goes to, and where this rank cuts. On a CPU.

    Args:
        topk_ids: [T, K] physical; group: as of `replica_balance`, which shift, quota and limits are of.
    Returns:
        chosen [T, K], physical; and cut [R, 4] for `clip_apply`.
    Source: docs/design/method.md 3b, 4b.
    """
    return _ops.replica_choose(topk_ids, topk_weights, weight, segment, group, shift, quota, limits, policy, places)


def clip_apply(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    router_logits: Tensor | None,
    shift: Tensor,
    cut: Tensor,
    policy: Policy,
    places: Tensor | None = None,
    chosen: Tensor | None = None,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clip what lies below the cut, re-route what finds room, drop the rest.

    Args:
        router_logits: [T, E] f32, or None: nothing is re-routed.
        shift, cut: of `clip_threshold`.
        places, chosen: with replicas, the tables, and what `replica_choose` gave.
        selection: [T, E] f32 of `selection_score`, which orders a token's candidates; None: their logits do.
    Returns:
        New topk_ids and topk_weights (dropped slots are -1 and 0.0), and counts [3, E, 2] i32: kept, clipped,
        re-routed in, by (expert, visual | text); with places [4, E, 2], the last one kept at another replica.
    Source: docs/design/method.md 5; the -1 convention is DeepEP's.
    """
    given = topk_ids, topk_weights, weight, segment, router_logits, shift, cut, policy
    return _ops.clip_apply(*given, places, chosen, selection)


def selection_score(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    scoring: str,
    num_groups: int = 1,
    topk_groups: int = 1,
) -> Tensor:
    """What a router ranks a token's experts by: score plus bias, -inf outside of the token's groups.

    Args:
        router_logits: [T, E] bf16, f16 or f32; one that is not finite gives -inf.
        correction_bias: [E] f32, or None.
        scoring: "softmax", "sigmoid" or "sqrtsoftplus".
        num_groups, topk_groups: the best topk_groups of E / num_groups neighbours each: by their best expert, with a
            bias by the sum of their best two; the first of equals.
    Returns:
        [T, E] f32.
    Source: docs/design/method.md 5; the ways of DeepSeek-V2 and V3.
    """
    return _ops.selection_score(
        router_logits, correction_bias, choice("scoring", scoring, SCORINGS), num_groups, topk_groups
    )


class Peers(NamedTuple):
    """An exchange over peers' memory.

    region: [peer_reduce_layout.bytes] u8, this rank's. addresses: of all ranks' regions, as this rank sees them.
    timeout_ns: after which a wait for a peer gives up; the region's status says so, and no sum is written.
    """

    region: Tensor | None
    addresses: list[int]
    rank: int
    timeout_ns: int


ALONE = Peers(None, [], 0, 0)


def plan(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    router_logits: Tensor | None,
    segment: Tensor,
    num_segments: int,
    modality: Tensor,
    policy: Policy,
    peers: Peers = ALONE,
    places: Tensor | None = None,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The operators in one call, the same bits, with the exchange between them. Only where `is_whole`; with peers,
    collective and on CUDA.

    Args:
        hidden_states: [T, H], not read where the policy needs no entropies.
        router_logits: [T, E] bf16, f16 or f32, or None; on CUDA, only clipped tokens' are read.
        places: tables of `plan.places.Places`, or None: experts lie linearly. On a CPU.
        selection: as of `clip_apply`.
    Returns:
        topk_ids, topk_weights, weight, own, group, cut, counts; group is own where this rank is the group. And, with
        places, rank_rows [2, R] i32, the group's rows of each rank as routed and as balanced, else None.
    """
    batch = hidden_states, topk_ids, topk_weights, router_logits, segment, num_segments
    return _ops.plan(*batch, modality, policy, *peers, places, selection)


def score_histogram(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    segment: Tensor,
    num_segments: int,
    policy: Policy,
    exchanged: bool,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`plan` before its exchange, where somebody else sums. Only where `is_whole`.

    Returns:
        weight [T] f32; own; group: a copy of own to be summed over the ranks if `exchanged`, else own; and a workspace
        for `threshold_apply`.
    """
    routed = topk_ids, topk_weights, segment, num_segments
    return _ops.score_histogram(hidden_states, *routed, policy, exchanged, places)


def threshold_apply(
    own: Tensor,
    group: Tensor,
    modality: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    router_logits: Tensor | None,
    workspace: Tensor,
    policy: Policy,
    places: Tensor | None = None,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`plan` behind its exchange. Only where `is_whole`.

    Args: as of `plan`; weight, own, group and workspace: of the `score_histogram` of the same batch.
    Returns:
        topk_ids, topk_weights, cut, counts, rank_rows.
    """
    routed = topk_ids, topk_weights, weight, segment, router_logits
    return _ops.threshold_apply(own, group, modality, *routed, workspace, policy, places, selection)


class RegionShape(NamedTuple):
    """What a rank's region looks like, the same on every rank (csrc/include/macs/fused.h, FusedShape).

    max_tokens: of a rank. num_blocks: SMs that a launch takes. format: index in
    choices.FORMATS. expert_rows: rows that each expert has room for, 0 = packed behind one another, each at a multiple
    of `alignment`. max_rows: of a rank's whole buffer.
    """

    num_ranks: int
    num_experts: int
    top_k: int
    max_tokens: int
    hidden_size: int
    num_blocks: int
    format: int
    expert_rows: int
    max_rows: int
    alignment: int = 1


class RegionLayout(NamedTuple):
    """Byte offsets into a rank's region, and the bytes of the whole (csrc/include/macs/fused.h, FusedLayout)."""

    flags: int
    tokens: int
    entries: int
    weighed: int
    weights: int
    counts: int
    rows: int
    row_scales: int
    scales: int
    outputs: int
    sources: int
    barrier: int
    entropy: int
    cuts: int
    wanted: int
    positions: int
    received: int
    starts: int
    epoch: int
    stamps: int
    status: int
    bytes: int


def fused_layout(shape: RegionShape) -> RegionLayout:
    """Where everything lies in a region of this shape."""
    return RegionLayout(*_ops.fused_layout(list(shape)))


def fused_dispatch(
    region: Tensor,
    peers: list[int],
    rank: int,
    shape: RegionShape,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    segment: Tensor,
    router_logits: Tensor | None,
    modality: Tensor,
    policy: Policy,
    *,
    num_segments: int,
    phase: str,
    timeout_ns: int,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The whole plan, its exchange and the sending of the kept rows in one launch. Collective. On CUDA.

    Args:
        region: [bytes] u8, this rank's; peers: addresses of all ranks' regions.
        hidden_states: [T, H] bf16, T <= shape.max_tokens; the routing as of `clip_apply`.
        modality: [E] i8.
        phase: "both" waits for everybody's rows; "send" leaves that to `fused_receive`.
        timeout_ns: after which a wait for a peer gives up; the region's status says so, and no row is received.
        layer: what the status says of where that was.
    Returns:
        topk_ids, topk_weights, weight [T], cut [NB, 4], counts [3, E, 2], and the group's sums [4] (N, N_visual,
        W_visual, W); rows, scales, received and positions lie in the region.
    Source: docs/design/fused_dispatch.md; the bits of `score_histogram` and `threshold_apply` over the group.
    """
    return _ops.fused_dispatch(
        region,
        peers,
        rank,
        list(shape),
        hidden_states,
        topk_ids,
        topk_weights,
        segment,
        router_logits,
        modality,
        policy,
        num_segments,
        choice("phase", phase, PHASES),
        timeout_ns,
        layer,
    )


def fused_carry(
    region: Tensor,
    peers: list[int],
    rank: int,
    shape: RegionShape,
    hidden_states: Tensor,
    topk_ids: Tensor,
    *,
    phase: str,
    timeout_ns: int,
    layer: int,
) -> None:
    """Sends every row to where it is routed, in one launch without a plan. Collective. On CUDA.

    Args:
        shape: with expert_rows >= num_ranks * max_tokens.
        hidden_states: [T, H] bf16, T <= shape.max_tokens; topk_ids: [T, K] i32 or i64, negative = none.
        The rest as of `fused_dispatch`; rows, scales, received and positions lie in the region.
    Source: csrc/cuda/fused_carry.cu. An expert's rows lie by source, beginning with the rank behind its own.
    """
    where = region, peers, rank, list(shape)
    _ops.fused_carry(*where, hidden_states, topk_ids, choice("phase", phase, PHASES), timeout_ns, layer)


def fused_receive(region: Tensor, peers: list[int], rank: int, shape: RegionShape, timeout_ns: int, layer: int) -> None:
    """Waits on the device until the rows of a dispatch or `fused_carry` that only sent are there. Collective."""
    _ops.fused_receive(region, peers, rank, list(shape), timeout_ns, layer)


def fused_combine(
    region: Tensor,
    peers: list[int],
    rank: int,
    shape: RegionShape,
    topk_ids: Tensor,
    topk_weights: Tensor,
    outputs: Tensor | None,
    *,
    phase: str,
    timeout_ns: int,
    layer: int,
) -> Tensor:
    """Every token's experts' outputs, pulled from their ranks and added up under the weights. Collective.

    Args:
        topk_ids, topk_weights: [T, K] as `fused_dispatch` left them.
        outputs: [max_rows, H] bf16 of this rank's experts, any shape of that size; None: they lie in the region.
        phase: "send" offers the outputs, "receive" adds up, "both" does both.
    Returns:
        [T, H] bf16; of no meaning after "send".
    """
    where = region, peers, rank, list(shape)
    return _ops.fused_combine(
        *where, topk_ids, topk_weights, outputs, choice("phase", phase, PHASES), timeout_ns, layer
    )


class PeerReduceLayout(NamedTuple):
    """Byte offsets into a rank's region of `peer_all_reduce` (csrc/include/macs/peer_all_reduce.h)."""

    status: int
    epochs: int
    inbox: int
    bytes: int


def peer_reduce_layout(num_ranks: int, size: int) -> PeerReduceLayout:
    """Where everything lies in the region of one of `num_ranks` that sum `size` numbers."""
    return PeerReduceLayout(*_ops.peer_reduce_layout(num_ranks, size))


def peer_all_reduce(peers: Peers, values: Tensor) -> None:
    """Sums [size] i32 values over the ranks in place, in one launch; sums wrap. Collective. On CUDA.

    Source: csrc/cuda/peer_all_reduce.cu.
    """
    _ops.peer_all_reduce(peers.region, peers.addresses, peers.rank, values, peers.timeout_ns)


def allocate_shared(size: int) -> tuple[Tensor, Tensor]:
    """[size] u8 of the current device, zero-filled, and the handle [64] u8 with which other processes map it."""
    return _ops.allocate_shared(size)


def open_shared(handle: Tensor) -> int:
    """Address, on the current device, of what another process of this host allocated."""
    return _ops.open_shared(handle)


def bounded_workspace_size(num_tokens: int, num_experts: int) -> int:
    """Numbers of scratch that `bounded_permute` needs for `num_tokens` tokens and `num_experts` experts of a rank."""
    return _ops.bounded_workspace_size(num_tokens, num_experts)


def bounded_permute(
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
) -> None:
    """Received tokens into rows by expert: each expert begins at a multiple of `tile`, its rows in the order of tokens.

    Args:
        topk_ids: [N, K] i64, experts of this rank from 0 to num_experts - 1, negative = none.
        tokens: [N, H], a row of 16 bytes or a multiple; scales: [N, S] f32 or None.
        place: [N, K] i32 out, row of each assignment; -1: none, -2: lost.
        expert_end: [num_experts] i32 out, behind the last row of each expert.
        rows: [M, H] out; row_scales: [S, M] f32 out, with scales. Rows that only fill a tile up are left as they are.
        workspace: [bounded_workspace_size] i32.
        lost: [1] i32, to which assignments are added that have no row: the buffer is full, there is no such expert, or
            the token names it twice.
    Source: csrc/include/macs/bounded.h.
    """
    _ops.bounded_permute(
        topk_ids, tokens, scales, num_experts, tile, place, expert_end, rows, row_scales, workspace, lost
    )


def bounded_gather(outputs: Tensor, place: Tensor, weights: Tensor, tokens: Tensor) -> None:
    """Each token's sum of weight times output, in f32 in the order of its slots, rounded once.

    Args:
        outputs: [M, H] bf16; place: [N, K] i32 of `bounded_permute`; weights: [N, K] f32.
        tokens: [N, H] bf16 out; a token with no assignment here is left as it is.
    Source: csrc/include/macs/bounded.h.
    """
    _ops.bounded_gather(outputs, place, weights, tokens)

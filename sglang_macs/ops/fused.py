"""The fused dispatch and combine (docs/design/fused_dispatch.md), in one launch each, over memory that ranks share."""

from typing import NamedTuple

from torch import Tensor

from ..choices import PHASES
from .library import loaded
from .policy import Policy, choice


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
    return RegionLayout(*loaded.fused_layout(list(shape)))


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
    return loaded.fused_dispatch(
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
    loaded.fused_carry(*where, hidden_states, topk_ids, choice("phase", phase, PHASES), timeout_ns, layer)


def fused_receive(region: Tensor, peers: list[int], rank: int, shape: RegionShape, timeout_ns: int, layer: int) -> None:
    """Waits on the device until the rows of a dispatch or `fused_carry` that only sent are there. Collective."""
    loaded.fused_receive(region, peers, rank, list(shape), timeout_ns, layer)


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
    return loaded.fused_combine(
        *where, topk_ids, topk_weights, outputs, choice("phase", phase, PHASES), timeout_ns, layer
    )

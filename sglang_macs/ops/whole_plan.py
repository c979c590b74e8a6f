"""The plan in one call, or in two around an all-reduce: the bits of the operators one by one, in few launches."""

from typing import NamedTuple

from torch import Tensor

from .library import loaded
from .policy import Policy


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
    return loaded.plan(*batch, modality, policy, *peers, places, selection)


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
    return loaded.score_histogram(hidden_states, *routed, policy, exchanged, places)


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
    return loaded.threshold_apply(own, group, modality, *routed, workspace, policy, places, selection)

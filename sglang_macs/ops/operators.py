"""The operators of a plan, one by one (docs/design/method.md)."""

from torch import Tensor

from ..choices import SCORINGS
from .library import loaded
from .policy import Policy, choice


def entropy_score(hidden_states: Tensor, segment: Tensor) -> Tensor:
    """Entropy of softmax over each visual token's features.

    Args:
        hidden_states: [T, H] bf16, f16 or f32, the MoE layer's input.
        segment: [T] i32, -1 = text.
    Returns:
        [T] f32, nats; 0 for text.
    Source: MACS section 3; docs/design/method.md 1.
    """
    return loaded.entropy_score(hidden_states, segment)


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
    return loaded.entropy_weight(entropy, segment, num_segments, delta)


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
        places: tables of `plan.places.Places`, or None: experts lie linearly. With them, ids are physical. On a GPU
            only in Triton: the extension's kernels take them in whole plans.
    Returns:
        [E * 2 * B + 4] i32; ranks add theirs up elementwise. With places, [R + R * X * 2] more lie behind.
    Source: docs/design/method.md 3, 3b.
    """
    return loaded.load_histogram(topk_ids, topk_weights, weight, segment, policy, places)


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
    return loaded.clip_threshold(own, group, modality, policy)


def replica_balance(
    own: Tensor, group: Tensor, modality: Tensor, policy: Policy, places: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How many rows each replica gets, and what this rank may send where a bound is exceeded all the same. On a GPU
    only in Triton.

    Args:
        own, group: of `load_histogram` with places, of this rank and summed over the EP group.
        modality: [E] i8.
    Returns:
        shift [E]; quota [P], rows of each place; load [R], rows of each rank; limits [R, 4]: rows that this rank may
        send of those that it counts (-1: all), first level counted, room, bound. All i32.
    Source: docs/design/method.md 3b, 4b.
    """
    return loaded.replica_balance(own, group, modality, policy, places)


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
    """Which replica each assignment goes to, and where this rank cuts. On a GPU only in Triton.

    Args:
        topk_ids: [T, K] physical; group: as of `replica_balance`, which shift, quota and limits are of.
    Returns:
        chosen [T, K], physical; and cut [R, 4] for `clip_apply`.
    Source: docs/design/method.md 3b, 4b.
    """
    return loaded.replica_choose(topk_ids, topk_weights, weight, segment, group, shift, quota, limits, policy, places)


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
    return loaded.clip_apply(*given, places, chosen, selection)


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
    return loaded.selection_score(
        router_logits, correction_bias, choice("scoring", scoring, SCORINGS), num_groups, topk_groups
    )

"""The method of docs/design/method.md in plain loops: the float64 oracle that the operators are tested against.

Everything goes in and comes out as (nested) lists of Python numbers. A float that stands for an f32 is one that f32
holds exactly; numpy serves only to round to f32 and to read its bits. Slow and short on purpose: this file is the
method written down a second time, and shares nothing with the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

OCTAVES = 16
ONE = 256  # fixed-point 1.0 of an entropy weight
I32_MAX = 2**31 - 1
STD_EPSILON = 1e-6

Rows = Sequence[Sequence[float]]
Ids = Sequence[Sequence[int]]


class Assignment(NamedTuple):
    """One (token, slot) with an expert: what it counts, and the bucket of its importance."""

    token: int
    slot: int
    expert: int
    text: int
    units: int
    bucket: int


@dataclass(frozen=True)
class RankInput:
    """What one rank brings to `plan`; `weight` [T] is `entropy_weight` of its tokens."""

    topk_ids: Ids
    topk_weights: Rows
    weight: Sequence[float]
    segment: Sequence[int]
    router_logits: Rows | None
    selection: Rows | None = None  # what candidates are ordered by in place of their logits


@dataclass(frozen=True)
class RankOutput:
    """What `plan` gives back to one rank, with the `shift` and `cut` behind it."""

    topk_ids: list[list[int]]
    topk_weights: list[list[float]]
    counts: list[list[list[int]]]
    shift: list[int]
    cut: list[list[int]]


def entropy_score(hidden_states: Rows, segment: Sequence[int]) -> list[float]:
    """Entropy [T] in nats of softmax over the features of hidden_states [T, H]; 0 where segment [T] is text."""
    entropy = []
    for features, scope in zip(hidden_states, segment, strict=True):
        if scope < 0:
            entropy.append(0.0)
            continue
        top = max(features)
        below = [x - top for x in features]
        z = math.fsum(math.exp(d) for d in below)
        entropy.append(math.log(z) - math.fsum(math.exp(d) * d for d in below) / z)
    return entropy


def entropy_weight(entropy: Sequence[float], segment: Sequence[int], num_segments: int, delta: float) -> list[float]:
    """Weight [T] of entropy [T] against the mean and deviation of its own segment; 1 for text."""
    weight = [1.0] * len(entropy)
    for scope in range(num_segments):
        members = [t for t, s in enumerate(segment) if s == scope]
        if not members:
            continue
        mean = math.fsum(entropy[t] for t in members) / len(members)
        std = math.sqrt(math.fsum((entropy[t] - mean) ** 2 for t in members) / len(members))
        for t in members:
            weight[t] = sigmoid(-delta * (entropy[t] - mean) / (std + STD_EPSILON))
    return weight


def selection_score(
    router_logits: Rows, bias: Sequence[float] | None, scoring: str, num_groups: int = 1, topk_groups: int = 1
) -> list[list[float]]:
    """Score plus bias [T, E] within the best groups, -inf outside of them and where a logit is not finite."""
    rows = []
    for logits in router_logits:
        added = [s if bias is None or s == -math.inf else s + bias[j] for j, s in enumerate(scores(logits, scoring))]
        width = len(added) // num_groups
        groups = [sorted(added[g * width : (g + 1) * width], reverse=True) for g in range(num_groups)]
        worth = [g[0] if bias is None else sum(g[:2]) for g in groups]
        taken = sorted(range(num_groups), key=lambda g, worth=worth: (-worth[g], g))[:topk_groups]
        rows.append([s if topk_groups == num_groups or j // width in taken else -math.inf for j, s in enumerate(added)])
    return rows


def scores(logits: Sequence[float], scoring: str) -> list[float]:
    """A token's scores [E] from its logits; -inf where one is not finite."""
    finite = [x for x in logits if math.isfinite(x)]
    top = max(finite, default=0.0)
    whole = math.fsum(math.exp(x - top) for x in finite)
    score = {
        "softmax": lambda x: math.exp(x - top) / whole,
        "sigmoid": sigmoid,
        "sqrtsoftplus": lambda x: math.sqrt(softplus(x)),
    }[scoring]
    return [score(x) if math.isfinite(x) else -math.inf for x in logits]


def load_histogram(
    topk_ids: Ids,
    topk_weights: Rows,
    weight: Sequence[float],
    segment: Sequence[int],
    *,
    num_experts: int,
    buckets: int,
    load: str,
    importance: str,
) -> list[int]:
    """Units by (expert, text, bucket), flat [E * 2 * B + 4], from ids and gates [T, K], weight and segment [T]."""
    histogram = [0] * (num_experts * 2 * buckets + 4)
    counted = set()
    for a in assignments(topk_ids, topk_weights, weight, segment, buckets, load, importance):
        histogram[(a.expert * 2 + a.text) * buckets + a.bucket] += a.units
        histogram[-4] += 1
        histogram[-3] += 1 - a.text
        counted.add(a.token)
    histogram[-2] = sum(fixed(weight[t]) for t in counted if segment[t] >= 0)
    histogram[-1] = sum(fixed(weight[t]) for t in counted)
    return histogram


def clip_threshold(
    own: Sequence[int],
    group: Sequence[int],
    modality: Sequence[int],
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
) -> tuple[list[int], list[list[int]]]:
    """Shift [E] and cut [NB, 4] = (level, quota, room, bound) from a rank's own and its group's histogram."""
    unit = ONE if load == "effective" else 1
    capacity = capacities(group, modality, gamma, rho, c_min)
    shift = [0] * len(modality)
    if scope == "rank" and alpha > 0:
        for j, of_expert in enumerate(capacity):
            units = sum(group[j * 2 * buckets : (j + 1) * 2 * buckets])
            shift[j] = pressure(units / unit, of_expert, alpha, buckets)
    per_rank = math.inf if gamma == math.inf else gamma * group[-4] / num_ranks
    bounds = [to_units(rows, unit) for rows in (capacity if scope == "expert" else [per_rank] * num_ranks)]
    width = len(modality) // len(bounds)
    group_levels, own_levels = (
        [level_sums(h, range(n * width, (n + 1) * width), shift, buckets, protect_text) for n in range(len(bounds))]
        for h in (group, own)
    )
    cut = [cut_one(*of_bound) for of_bound in zip(group_levels, own_levels, bounds, strict=True)]
    share_room(cut, group_levels, own_levels, num_ranks, reroute)
    return shift, cut


def clip_apply(
    topk_ids: Ids,
    topk_weights: Rows,
    weight: Sequence[float],
    segment: Sequence[int],
    router_logits: Rows | None,
    shift: Sequence[int],
    cut: Sequence[Sequence[int]],
    selection: Rows | None = None,
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
) -> tuple[list[list[int]], list[list[float]], list[list[list[int]]]]:
    """New ids and weights [T, K] and counts [3, E, 2] = (kept, clipped, re-routed in) by (expert, text)."""
    experts = len(shift)
    ids, weights = [list(row) for row in topk_ids], [list(row) for row in topk_weights]
    counts = [[[0, 0] for _ in range(experts)] for _ in range(3)]
    running = [0] * len(cut)
    unplaced = []
    for a in assignments(topk_ids, topk_weights, weight, segment, buckets, load, importance):
        n = a.expert * len(cut) // experts
        level, quota = cut[n][:2]
        own_level = level_of(a.bucket, a.text, shift[a.expert], buckets, protect_text)
        if own_level == level:
            running[n] += a.units
        stays = own_level > level or (own_level == level and running[n] <= quota)
        counts[0 if stays else 1][a.expert][a.text] += 1
        if not stays:
            unplaced.append(a)
    for a in unplaced:
        ids[a.token][a.slot], weights[a.token][a.slot] = -1, 0.0
    if reroute != "none" and router_logits is not None:
        order = router_logits if selection is None else selection
        placed = find_places(unplaced, topk_ids, order, cut, experts // num_ranks, reroute, reroute_rounds)
        for a, expert in placed:
            counts[2][expert][a.text] += 1
            ids[a.token][a.slot] = expert
            weights[a.token][a.slot] = rerouted_weight(
                topk_ids[a.token], topk_weights[a.token], router_logits[a.token], expert, scoring
            )
    return ids, weights, counts


def plan(
    ranks: Sequence[RankInput],
    config: Any,
    *,
    num_experts: int,
    num_ranks: int,
    modality: Sequence[int],
    scoring: str = "softmax",
) -> list[RankOutput]:
    """Histogram, exchange, threshold and apply for every rank of a group; `config` has the fields of MacsConfig."""
    common = {name: getattr(config, name) for name in ("buckets", "load")}
    order = {"num_ranks": num_ranks} | {name: getattr(config, name) for name in ("scope", "reroute", "protect_text")}
    own = [
        load_histogram(
            r.topk_ids, r.topk_weights, r.weight, r.segment,
            num_experts=num_experts, importance=config.importance, **common,
        )
        for r in ranks
    ]  # fmt: skip
    total = [sum(cells) for cells in zip(*own, strict=True)]
    local = config.exchange == "local"
    outputs = []
    for rank, histogram in zip(ranks, own, strict=True):
        shift, cut = clip_threshold(
            histogram, histogram if local else total, modality,
            gamma=config.gamma, rho=config.rho, alpha=config.alpha,
            c_min=config.c_min / num_ranks if local else config.c_min, **common, **order,
        )  # fmt: skip
        result = clip_apply(
            rank.topk_ids, rank.topk_weights, rank.weight, rank.segment, rank.router_logits, shift, cut,
            rank.selection, importance=config.importance, reroute_rounds=config.reroute_rounds, scoring=scoring,
            **common, **order,
        )  # fmt: skip
        outputs.append(RankOutput(*result, shift, cut))
    return outputs


def fixed(weight: float) -> int:
    """An entropy weight in 256ths, at least one; Python's round is half to even, as rint is."""
    return max(1, round(ONE * weight))


def bits(value: float) -> int:
    """The bit pattern of `value` rounded to f32."""
    return int(np.float32(value).view(np.int32))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """log(1 + exp(x)) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def octave_bits(buckets: int) -> int:
    """m of B = 2^(4 + m): an octave has 2^m buckets."""
    return (buckets // OCTAVES).bit_length() - 1


def bucket_of(importance: float, buckets: int) -> int:
    """Bucket of an f32 importance: its leading exponent and mantissa bits, 16 octaves below 1."""
    if not importance > 0:
        return 0
    m = octave_bits(buckets)
    return min(max((bits(importance) >> (23 - m)) - ((127 - OCTAVES) << m), 0), buckets - 1)


def level_of(bucket: int, text: int, shift: int, buckets: int, protect_text: bool) -> int:
    """Place of an assignment in the order in which a bound gives things up, lowest first."""
    shifted = max(0, bucket - shift)
    return buckets + shifted if protect_text and text else shifted


def assignments(
    topk_ids: Ids,
    topk_weights: Rows,
    weight: Sequence[float],
    segment: Sequence[int],
    buckets: int,
    load: str,
    importance: str,
) -> Iterator[Assignment]:
    """Every non-empty (token, slot) in order."""
    for t, (ids, gates) in enumerate(zip(topk_ids, topk_weights, strict=True)):
        for k, (expert, gate) in enumerate(zip(ids, gates, strict=True)):
            if expert < 0:
                continue
            s = {
                "entropy": weight[t],
                "gate": gate,
                "entropy_gate": float(np.float32(weight[t]) * np.float32(gate)),
            }[importance]
            units = fixed(weight[t]) if load == "effective" else 1
            yield Assignment(t, k, expert, int(segment[t] < 0), units, bucket_of(s, buckets))


def capacities(group: Sequence[int], modality: Sequence[int], gamma: float, rho: float, c_min: float) -> list[float]:
    """C [E] in rows, scaled by the visual share of the group's entropy weight."""
    if gamma == math.inf:
        return [math.inf] * len(modality)
    visual_share = group[-2] / group[-1] if group[-1] else 0.5
    base = gamma * group[-4] / len(modality)
    return [max(c_min, base * (1 + rho * m * (visual_share - 0.5))) for m in modality]


def to_units(rows: float, unit: int) -> int:
    """A bound in units, clamped to what i32 holds."""
    return min(max(math.floor(min(rows * unit, I32_MAX)), 0), I32_MAX)


def pressure(load: float, capacity: float, alpha: float, buckets: int) -> int:
    """Buckets that an expert over its capacity moves down: alpha log2(load / capacity), piecewise linear."""
    if load <= capacity:
        return 0
    if capacity == 0:
        return buckets - 1
    m = octave_bits(buckets)
    log2 = bits(load / capacity) - (127 << 23)
    return min(buckets - 1, (log2 * round(65536 * alpha) + (1 << (38 - m))) >> (39 - m))


def level_sums(
    histogram: Sequence[int], experts: Sequence[int], shift: Sequence[int], buckets: int, protect_text: bool
) -> list[int]:
    """Units [2 B] at every level over the experts of one bound."""
    sums = [0] * (2 * buckets)
    for j in experts:
        for text in (0, 1):
            for b in range(buckets):
                sums[level_of(b, text, shift[j], buckets, protect_text)] += histogram[(j * 2 + text) * buckets + b]
    return sums


def cut_one(group_levels: Sequence[int], own_levels: Sequence[int], bound: int) -> list[int]:
    """(level, own quota at it, room of the group, bound): everything above the level fits, the level does not."""
    above = 0
    for level in reversed(range(len(group_levels))):
        if above + group_levels[level] > bound:
            return [level, (bound - above) * own_levels[level] // group_levels[level], 0, bound]
        above += group_levels[level]
    return [-1, 0, bound - above, bound]


def share_room(cut: list[list[int]], group_levels: Rows, own_levels: Rows, num_ranks: int, reroute: str) -> None:
    """Replace the group's room of every bound by this rank's share: its part of what may be given up."""
    per_rank = len(cut) // num_ranks
    losers = [n for n, (level, *_) in enumerate(cut) if level >= 0]
    for n, bound in enumerate(cut):
        near = [i for i in losers if reroute == "global" or i // per_rank == n // per_rank]
        at_stake = sum(sum(group_levels[i][: cut[i][0] + 1]) for i in near)
        own = sum(sum(own_levels[i][: cut[i][0] + 1]) for i in near)
        bound[2] = bound[2] * own // at_stake if at_stake and reroute != "none" else 0


def find_places(
    unplaced: Sequence[Assignment],
    topk_ids: Ids,
    order: Rows,
    cut: Sequence[Sequence[int]],
    experts_per_rank: int,
    reroute: str,
    rounds: int,
) -> list[tuple[Assignment, int]]:
    """(clipped assignment, new expert) for all that find one, in rounds of proposals."""
    experts = len(order[0]) if order else 0
    room = [bound[2] for bound in cut]
    taken = [set(ids) for ids in topk_ids]
    placed = []
    for _ in range(rounds):
        turn: dict[tuple[int, int], int] = {}
        proposals = []
        for a in unplaced:
            origin = a.expert // experts_per_rank if reroute == "local" else -1
            candidates = [
                j
                for j in range(experts)
                if math.isfinite(order[a.token][j])
                and j not in taken[a.token]
                and room[j * len(cut) // experts] >= a.units
                and origin in (-1, j // experts_per_rank)
            ]
            candidates.sort(key=lambda j, row=order[a.token]: (-row[j], j))
            i = turn.get((a.token, origin), 0)
            turn[a.token, origin] = i + 1
            if i < len(candidates):
                proposals.append((a, candidates[i]))
        running, accepted = [0] * len(cut), []
        for a, j in proposals:
            n = j * len(cut) // experts
            running[n] += a.units
            if running[n] <= room[n]:
                accepted.append((a, j))
        for a, j in accepted:
            room[j * len(cut) // experts] -= a.units
            taken[a.token].add(j)
        placed += accepted
        unplaced = [a for a in unplaced if a not in {b for b, _ in accepted}]
    return placed


def rerouted_weight(
    ids: Sequence[int], gates: Sequence[float], logits: Sequence[float], expert: int, scoring: str
) -> float:
    """The new expert's own router probability under the scaling of the token's top-k weights."""
    ref = max((k for k in range(len(ids)) if ids[k] >= 0), key=lambda k: (gates[k], -k))
    new, old = logits[expert], logits[ids[ref]]
    if gates[ref] == 0:
        return 0.0
    if scoring == "softmax":
        return gates[ref] * math.exp(new - old)
    if scoring == "sigmoid":
        return gates[ref] * sigmoid(new) / sigmoid(old)
    return gates[ref] * math.sqrt(softplus(new) / softplus(old))

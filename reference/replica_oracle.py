"""The plan with replicas (docs/design/method.md, 3b and 4b) in plain loops, on top of `oracle`: what the operators are
tested against. Scope rank, load rows, exchange group; ids in and out are physical, everything between is logical.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import oracle

SHARE_ONE = 256  # a place's share of its expert's rows, in 256ths
SWEEPS = 8


class Placement:
    """Where the experts of one layer lie: `ranks` and `physical`, for each expert, are its places by ascending rank."""

    def __init__(self, physical_to_logical: Sequence[int], num_experts: int, num_ranks: int) -> None:
        self.logical = list(physical_to_logical)
        self.num_experts, self.num_ranks = num_experts, num_ranks
        self.width = len(self.logical) // num_ranks
        first: list[dict[int, int]] = [{} for _ in range(num_experts)]
        for p, e in enumerate(self.logical):
            first[e].setdefault(p // self.width, p)  # the first copy on a rank stands for the others there
        self.ranks = [sorted(of_expert) for of_expert in first]
        self.physical = [[first[e][r] for r in ranks] for e, ranks in enumerate(self.ranks)]
        self.replicated = [e for e in range(num_experts) if len(self.ranks[e]) > 1]
        self.redundant = len(self.logical) - num_experts
        self.steps = self._steps()

    def _steps(self) -> list[list[int]]:
        """Replicated experts, most places first, each in the first step none of whose experts shares a rank with it."""
        steps: list[list[int]] = []
        for e in sorted(self.replicated, key=lambda e: (-len(self.ranks[e]), e)):
            for step in steps:
                if not any(set(self.ranks[e]) & set(self.ranks[other]) for other in step):
                    step.append(e)
                    break
            else:
                steps.append([e])
        return steps

    def unmap(self, ids: oracle.Ids) -> list[list[int]]:
        """Logical ids of physical ones."""
        return [[self.logical[p] if p >= 0 else -1 for p in row] for row in ids]


@dataclass(frozen=True)
class Balance:
    """What every rank derives from the exchange: quota by place, rows by rank, and what each rank may keep.

    limits: (limit, first level that it counts, room, bound) of every rank, limit -1 where its bound is not exceeded.
    """

    shift: list[int]
    quota: list[list[int]]
    load: list[int]
    limits: list[list[int]]


@dataclass(frozen=True)
class ReplicaOutput(oracle.RankOutput):
    """`topk_ids`: physical. chosen: physical, before clipping. counts: a fourth row, moved."""

    chosen: list[list[int]]
    balance: Balance


def pour(rows: int, loads: Sequence[int]) -> list[int]:
    """Rows onto places of these loads, as water finds its level; the rest, one row each, to the first at the level."""
    level = max(level for level in range(min(loads), max(loads) + rows + 1)
                if sum(max(0, level - load) for load in loads) <= rows)  # fmt: skip
    poured = [max(0, level - load) for load in loads]
    rest = rows - sum(poured)
    for i, load in enumerate(loads):
        if rest and load <= level:
            poured[i] += 1
            rest -= 1
    return poured


def even_split(rows: int, places: int) -> list[int]:
    return [rows * (i + 1) // places - rows * i // places for i in range(places)]


def balance_rows(rows: Sequence[int], placement: Placement) -> tuple[list[list[int]], list[int]]:
    """(quota of every place, rows of every rank) for the group's rows [E] of each expert."""
    quota = [even_split(n, len(ranks)) for n, ranks in zip(rows, placement.ranks, strict=True)]
    load = [0] * placement.num_ranks
    for ranks, parts in zip(placement.ranks, quota, strict=True):
        for r, part in zip(ranks, parts, strict=True):
            load[r] += part
    for _ in range(SWEEPS):
        changed = False
        for e in (e for step in placement.steps for e in step):
            ranks = placement.ranks[e]
            for r, part in zip(ranks, quota[e], strict=True):
                load[r] -= part
            poured = pour(rows[e], [load[r] for r in ranks])
            changed, quota[e] = changed or poured != quota[e], poured
            for r, part in zip(ranks, poured, strict=True):
                load[r] += part
        if not changed:
            break
    return quota, load


def place_of(number: int, rows: int, quota: Sequence[int]) -> int:
    """Which place the row of that number, of all `rows` of its expert, goes to: nested floors."""
    for i, part in enumerate(quota[:-1]):
        before = number * part // rows
        if (number + 1) * part // rows > before:
            return i
        number, rows = number - before, rows - part
    return len(quota) - 1


def rows_before(number: int, rows: int, quota: Sequence[int]) -> list[int]:
    """How many of the first `number` rows of an expert each place gets."""
    counts = []
    for part in quota[:-1]:
        counts.append(number * part // rows if rows else 0)
        number, rows = number - counts[-1], rows - part
    return [*counts, number]


def shares(rows: int, quota: Sequence[int]) -> list[int]:
    """Of each place, in 256ths of its expert's rows."""
    ends = [0] + [SHARE_ONE * sum(quota[: i + 1]) // rows if rows else SHARE_ONE for i in range(len(quota))]
    return [b - a for a, b in itertools.pairwise(ends)]


def load_histogram(one: oracle.RankInput, rank: int, config: Any, placement: Placement) -> list[int]:
    """The histogram over logical experts, and behind it the rows of every rank as they were routed [R], and this rank's
    rows of each replicated expert by (text first), in its own row of [R, X, 2].
    """
    ids = placement.unmap(one.topk_ids)
    histogram = oracle.load_histogram(
        ids, one.topk_weights, one.weight, one.segment,
        num_experts=placement.num_experts, buckets=config.buckets, load="rows", importance=config.importance,
    )  # fmt: skip
    routed = [0] * placement.num_ranks
    rows = [[[0, 0] for _ in range(placement.redundant)] for _ in range(placement.num_ranks)]
    for logical, physical, segment in zip(ids, one.topk_ids, one.segment, strict=True):
        for e, p in zip(logical, physical, strict=True):
            if p < 0:
                continue
            routed[p // placement.width] += 1
            if e in placement.replicated:
                rows[rank][placement.replicated.index(e)][segment >= 0] += 1
    return histogram + routed + [n for of_rank in rows for pair in of_rank for n in pair]


def histogram_part(exchanged: Sequence[int], config: Any, placement: Placement) -> Sequence[int]:
    """Without what lies behind it."""
    return exchanged[: placement.num_experts * 2 * config.buckets + 4]


def source_rows(group: Sequence[int], config: Any, placement: Placement, expert: int) -> list[tuple[int, int]]:
    """(text, visual) rows of a replicated expert, by source rank."""
    at = len(histogram_part(group, config, placement)) + placement.num_ranks + 2 * placement.replicated.index(expert)
    return [tuple(group[at + 2 * s * placement.redundant :][:2]) for s in range(placement.num_ranks)]


def balance(
    own: Sequence[int], group: Sequence[int], modality: Sequence[int], config: Any, placement: Placement
) -> Balance:
    """Quotas and limits from this rank's and the group's exchange."""
    experts, buckets = placement.num_experts, config.buckets
    mine, whole = (histogram_part(h, config, placement) for h in (own, group))
    cells = [whole[e * 2 * buckets : (e + 1) * 2 * buckets] for e in range(experts)]
    rows, text = [sum(c) for c in cells], [sum(c[buckets:]) for c in cells]
    quota, load = balance_rows(rows, placement)
    shift = _shift(rows, whole, modality, config, placement)
    bound = oracle.to_units(math.inf if config.gamma == math.inf else config.gamma * whole[-4] / placement.num_ranks, 1)
    limits, stakes = [], []
    for r in range(placement.num_ranks):
        if load[r] <= bound:
            limits.append([-1, 0, bound - load[r], bound])
            continue
        on_rank = [(e, i) for e in range(experts) for i, at in enumerate(placement.ranks[e]) if at == r]
        text_rows = sum(rows_before(text[e], rows[e], quota[e])[i] for e, i in on_rank)
        weighed = [_weighed(h, on_rank, rows, quota, shift, config) for h in (whole, mine)]
        limit, first, stake = _limit(*weighed, bound, text_rows, config)
        limits.append([limit, first, 0, bound])
        stakes.append(stake)
    at_stake, own_stake = (sum(part) for part in zip(*stakes, strict=True)) if stakes else (0, 0)
    for limit in limits:
        limit[2] = limit[2] * own_stake // at_stake if at_stake and config.reroute != "none" else 0
    return Balance(shift, quota, load, limits)


def _shift(rows: Sequence[int], whole: Sequence[int], modality: Sequence[int], config: Any, placement: Placement):
    shift = [0] * len(rows)
    if config.alpha == 0 or config.gamma == math.inf:
        return shift
    visual_share = whole[-2] / whole[-1] if whole[-1] else 0.5
    base = config.gamma * whole[-4] / sum(len(ranks) for ranks in placement.ranks)
    for e, m in enumerate(modality):
        capacity = max(config.c_min, base * len(placement.ranks[e]) * (1 + config.rho * m * (visual_share - 0.5)))
        shift[e] = oracle.pressure(float(rows[e]), capacity, config.alpha, config.buckets)
    return shift


def _weighed(histogram, on_rank, rows, quota, shift, config) -> list[int]:
    """Levels [2 B] of a rank's experts in 256ths of a row, each by its share there."""
    levels = [0] * (2 * config.buckets)
    for e, i in on_rank:
        share = shares(rows[e], quota[e])[i]
        for level, n in enumerate(oracle.level_sums(histogram, [e], shift, config.buckets, config.protect_text)):
            levels[level] += share * n
    return levels


def _limit(group_levels, own_levels, bound: int, text_rows: int, config: Any) -> tuple[int, int, tuple[int, int]]:
    """(rows that this source keeps on an exceeded rank, first level that they are counted on, what is at stake)."""
    first, end, room = 0, 2 * config.buckets, bound
    if config.protect_text:
        if text_rows <= bound:  # all text stays, visual rows share what it leaves
            first, end, room = 0, config.buckets, bound - text_rows
        else:  # no visual row stays
            first, end, room = config.buckets, 2 * config.buckets, bound
    top = room * SHARE_ONE
    whole, mine = group_levels[first:end], own_levels[first:end]
    if sum(whole) <= top:
        level, kept = first - 1, top * sum(mine) // sum(whole) if sum(whole) else 0
    else:
        level, quota, _, _ = oracle.cut_one(whole, mine, top)
        level, kept = level + first, sum(mine[level + 1 :]) + quota
    return kept // SHARE_ONE, first, (sum(group_levels[: level + 1]), sum(own_levels[: level + 1]))


def choose(
    one: oracle.RankInput, rank: int, group: Sequence[int], balance: Balance, config: Any, placement: Placement
) -> tuple[list[list[int]], list[list[int]]]:
    """(physical ids, cut [R, 4] = (level, quota, room, bound)) of this rank's own assignments."""
    number = {}
    for e in placement.replicated:
        of_source = source_rows(group, config, placement, e)
        text = sum(t for t, _ in of_source)
        number[e] = [text + sum(v for _, v in of_source[:rank]), sum(t for t, _ in of_source[:rank])]
    rows = {e: sum(sum(pair) for pair in source_rows(group, config, placement, e)) for e in placement.replicated}
    chosen = [list(row) for row in one.topk_ids]
    levels = [[0] * (2 * config.buckets) for _ in range(placement.num_ranks)]
    for a in _assignments(one, config, placement):
        place = 0
        if a.expert in number:
            place = place_of(number[a.expert][a.text], rows[a.expert], balance.quota[a.expert])
            number[a.expert][a.text] += 1
        chosen[a.token][a.slot] = placement.physical[a.expert][place]
        level = oracle.level_of(a.bucket, a.text, balance.shift[a.expert], config.buckets, config.protect_text)
        levels[placement.ranks[a.expert][place]][level] += 1
    return chosen, [_own_cut(*pair, config) for pair in zip(levels, balance.limits, strict=True)]


def _own_cut(levels: Sequence[int], limits: Sequence[int], config: Any) -> list[int]:
    """The level at which a source that may keep `limit` rows on a rank cuts its own, and its quota there."""
    limit, first, room, bound = limits
    if limit < 0:
        return [-1, 0, room, bound]
    text_stays = config.protect_text and first == 0
    above = 0
    for level in reversed(range(first, config.buckets if text_stays else 2 * config.buckets)):
        if above + levels[level] > limit:
            return [level, limit - above, room, bound]
        above += levels[level]
    return [first - 1, 0, room, bound]


def clip(
    one: oracle.RankInput, chosen: oracle.Ids, shift: Sequence[int], cut: Sequence[Sequence[int]], config: Any,
    placement: Placement, scoring: str,
) -> tuple[list[list[int]], list[list[float]], list[list[list[int]]]]:  # fmt: skip
    """New physical ids and weights [T, K] and counts [4, E, 2] = (kept, clipped, re-routed in, moved)."""
    ids, weights = [list(row) for row in chosen], [list(row) for row in one.topk_weights]
    counts = [[[0, 0] for _ in range(placement.num_experts)] for _ in range(4)]
    at_level, unplaced = [0] * placement.num_ranks, []
    for a in _assignments(one, config, placement):
        physical = chosen[a.token][a.slot]
        rank = physical // placement.width
        level, quota = cut[rank][:2]
        own_level = oracle.level_of(a.bucket, a.text, shift[a.expert], config.buckets, config.protect_text)
        at_level[rank] += own_level == level
        stays = own_level > level or (own_level == level and at_level[rank] <= quota)
        counts[0 if stays else 1][a.expert][a.text] += 1
        if stays:
            counts[3][a.expert][a.text] += physical != one.topk_ids[a.token][a.slot]
        else:
            unplaced.append(a)
            ids[a.token][a.slot], weights[a.token][a.slot] = -1, 0.0
    if config.reroute != "none" and one.router_logits is not None:
        logical = placement.unmap(one.topk_ids)
        order = one.router_logits if one.selection is None else one.selection
        for a, expert, physical in _placed(unplaced, logical, order, cut, config, placement):
            counts[2][expert][a.text] += 1
            ids[a.token][a.slot] = physical
            weights[a.token][a.slot] = oracle.rerouted_weight(
                logical[a.token], one.topk_weights[a.token], one.router_logits[a.token], expert, scoring
            )
    return ids, weights, counts


def _placed(unplaced, logical, order, cut, config, placement) -> list[tuple[oracle.Assignment, int, int]]:
    """(clipped assignment, new expert, its physical expert): an expert's place is the one with most room."""
    room, taken = [bound[2] for bound in cut], [set(ids) for ids in logical]
    placed = []
    for _ in range(config.reroute_rounds):
        best = [max(range(len(r)), key=lambda i, r=r: (room[r[i]], -i)) for r in placement.ranks]
        rank_of = [ranks[i] for ranks, i in zip(placement.ranks, best, strict=True)]
        turn: dict[int, int] = {}
        proposals = []
        for a in unplaced:
            row = order[a.token]
            open_to = [
                j for j, r in enumerate(rank_of) if math.isfinite(row[j]) and j not in taken[a.token] and room[r] >= 1
            ]
            open_to.sort(key=lambda j, row=row: (-row[j], j))
            i = turn.get(a.token, 0)
            turn[a.token] = i + 1
            if i < len(open_to):
                proposals.append((a, open_to[i]))
        running, accepted = [0] * placement.num_ranks, []
        for a, j in proposals:
            running[rank_of[j]] += 1
            if running[rank_of[j]] <= room[rank_of[j]]:
                accepted.append((a, j))
        for a, j in accepted:
            room[rank_of[j]] -= 1
            taken[a.token].add(j)
            placed.append((a, j, placement.physical[j][best[j]]))
        unplaced = [a for a in unplaced if a not in {b for b, _ in accepted}]
    return placed


def _assignments(one: oracle.RankInput, config: Any, placement: Placement):
    ids = placement.unmap(one.topk_ids)
    common = one.topk_weights, one.weight, one.segment, config.buckets, "rows", config.importance
    return oracle.assignments(ids, *common)


def plan(
    ranks: Sequence[oracle.RankInput],
    config: Any,
    placement: Placement,
    modality: Sequence[int],
    scoring: str = "softmax",
) -> list[ReplicaOutput]:
    """Histogram, exchange, balance, choice, cut and apply for every rank of a group."""
    own = [load_histogram(one, r, config, placement) for r, one in enumerate(ranks)]
    group = [sum(cells) for cells in zip(*own, strict=True)]
    outputs = []
    for r, (one, mine) in enumerate(zip(ranks, own, strict=True)):
        balanced = balance(mine, group, modality, config, placement)
        chosen, cut = choose(one, r, group, balanced, config, placement)
        clipped = clip(one, chosen, balanced.shift, cut, config, placement, scoring)
        outputs.append(ReplicaOutput(*clipped, balanced.shift, cut, chosen, balanced))
    return outputs

"""Vectorised numpy references of docs/design/method.md for sizes where the loops of reference/oracle.py would take
hours.

Written from the contract, sharing nothing with csrc; itself checked against the oracle at small sizes (check_kernels).
"""

from __future__ import annotations

import numpy as np


def fixed(weight: np.ndarray) -> np.ndarray:
    return np.maximum(1, np.rint(weight.astype(np.float32) * np.float32(256))).astype(np.int64)


def buckets_of(ids, gates, weight, *, buckets: int, importance: str) -> np.ndarray:
    """Bucket [T, K] of every slot."""
    w = np.broadcast_to(weight[:, None], ids.shape).astype(np.float32)
    s = {"entropy": w, "gate": gates, "entropy_gate": w * gates}[importance].astype(np.float32)
    m = int(np.log2(buckets // 16))
    raw = (np.ascontiguousarray(s).view(np.int32).astype(np.int64) >> (23 - m)) - ((127 - 16) << m)
    return np.where(s > 0, np.clip(raw, 0, buckets - 1), 0)


def load_histogram(ids, gates, weight, segment, *, num_experts, buckets, load, importance) -> np.ndarray:
    valid, text = ids >= 0, (segment < 0).astype(np.int64)
    units = np.broadcast_to((fixed(weight) if load == "effective" else np.ones_like(segment))[:, None], ids.shape)
    bucket = buckets_of(ids, gates, weight, buckets=buckets, importance=importance)
    cell = ((ids * 2 + text[:, None]) * buckets + bucket)[valid]
    cells = np.zeros(num_experts * 2 * buckets, np.int64)
    np.add.at(cells, cell, units[valid])
    counted, visual = valid.any(1), segment >= 0
    sums = [valid.sum(), valid[visual].sum(), fixed(weight)[counted & visual].sum(), fixed(weight)[counted].sum()]
    return np.concatenate([cells, np.array(sums)])


def _accept(order_key: np.ndarray, units: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Which entries, in the order given, keep the running sum of their key's units within its limit."""
    accepted = np.zeros(len(order_key), bool)
    for key in np.unique(order_key):
        mine = np.flatnonzero(order_key == key)
        accepted[mine] = np.cumsum(units[mine]) <= limit[key]
    return accepted


def clip_apply(
    ids, gates, weight, segment, logits, shift, cut, *,
    num_ranks, buckets, scope, load, importance, reroute, protect_text, reroute_rounds, scoring, selection=None,
):  # fmt: skip
    """(new_ids, new_weights f64, counts [3, E, 2])."""
    tokens, experts = len(ids), len(shift)
    local = experts // num_ranks
    bound_of = np.arange(experts) if scope == "expert" else np.arange(experts) // local
    valid, text = ids >= 0, segment < 0
    unit = fixed(weight) if load == "effective" else np.ones(tokens, np.int64)
    safe = np.where(valid, ids, 0)
    level = np.maximum(0, buckets_of(ids, gates, weight, buckets=buckets, importance=importance) - shift[safe])
    level = level + np.where(text[:, None] & bool(protect_text), buckets, 0)
    bound, at = bound_of[safe], cut[:, 0][bound_of[safe]]
    stays = valid & (level > at)
    t, k = np.nonzero(valid & (level == at))
    stays[t, k] = _accept(bound[t, k], unit[t], cut[:, 1])
    clipped = valid & ~stays
    new_ids, new_weights = np.where(clipped, -1, ids), np.where(clipped, 0.0, gates.astype(np.float64))
    counts = np.zeros((3, experts, 2), np.int64)
    side = np.broadcast_to(text[:, None], ids.shape).astype(np.int64)
    for kind, mask in ((0, stays), (1, clipped)):
        np.add.at(counts[kind], (ids[mask], side[mask]), 1)
    if reroute == "none" or logits is None:
        return new_ids, new_weights, counts
    room = cut[:, 2].astype(np.int64).copy()
    taken = np.zeros((tokens, experts), bool)
    rows, cols = np.nonzero(valid)
    taken[rows, ids[rows, cols]] = True
    unplaced, order = clipped.copy(), logits if selection is None else selection
    for _ in range(reroute_rounds):
        wants = _proposals(ids, order, unplaced, taken, room, unit, bound_of, local if reroute == "local" else 0)
        t, k = np.nonzero(wants >= 0)
        if len(t) == 0:
            break
        to = wants[t, k]
        ok = _accept(bound_of[to], unit[t], room)
        t, k, to = t[ok], k[ok], to[ok]
        np.subtract.at(room, bound_of[to], unit[t])
        taken[t, to] = True
        unplaced[t, k] = False
        new_ids[t, k] = to
        ref = np.where(valid[t], gates[t], -np.inf).argmax(1)
        here, there = logits[t, ids[t, ref]].astype(np.float64), logits[t, to].astype(np.float64)
        new_weights[t, k] = np.where(gates[t, ref] == 0, 0, gates[t, ref] * _score_ratio(scoring, there, here))
        np.add.at(counts[2], (to, text[t].astype(np.int64)), 1)
    return new_ids, new_weights, counts


def _score_ratio(scoring: str, there: np.ndarray, here: np.ndarray) -> np.ndarray:
    """Of the scores of two experts, from their logits."""
    if scoring == "softmax":
        return np.exp(there - here)
    if scoring == "sigmoid":
        return (1 + np.exp(-here)) / (1 + np.exp(-there))
    return np.sqrt(np.logaddexp(0, there) / np.logaddexp(0, here))


def _proposals(ids, order, unplaced, taken, room, unit, bound_of, local: int) -> np.ndarray:
    """Expert [T, K] that each unplaced slot wants, -1 for none; `local` = experts per rank, 0 for any rank."""
    wants = np.full(ids.shape, -1)
    rows = np.flatnonzero(unplaced.any(1))
    keys = np.where(np.isfinite(order[rows]) & ~taken[rows], order[rows], -np.inf).astype(np.float64)
    keys[room[bound_of][None, :] < unit[rows][:, None]] = -np.inf
    for k in range(ids.shape[1]):
        mine = np.flatnonzero(unplaced[rows, k])
        left = keys[mine]
        if local:
            other = np.arange(keys.shape[1])[None, :] // local != ids[rows[mine], k][:, None] // local
            left = np.where(other, -np.inf, left)
        best = left.argmax(1) if len(mine) else np.zeros(0, np.int64)
        some = left[np.arange(len(mine)), best] > -np.inf
        wants[rows[mine[some]], k] = best[some]
        keys[mine[some], best[some]] = -np.inf
    return wants

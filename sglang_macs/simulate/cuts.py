"""The plan of docs/design/method.md at the level of loads: how many rows each bound keeps, clips, re-routes and drops.

Which assignment goes is not modelled, only how many; sums stay real numbers. What the operators do beyond that: a
re-route must find an expert that the token has not chosen, so a few rows are dropped that find room here.
"""

from dataclasses import dataclass

import numpy as np

from ..config import MacsConfig
from .loads import TEXT, VISUAL


@dataclass(frozen=True)
class Cut:
    """after [..., E]: rows that are dispatched. clipped, dropped [...]: rows of all experts."""

    after: np.ndarray
    clipped: np.ndarray
    dropped: np.ndarray


def cut(rows: np.ndarray, config: MacsConfig, num_ranks: int, modality: np.ndarray | None = None) -> Cut:
    """Bounds rows [..., 2, E] (visual, text) of an EP group.

    modality: broadcastable to [..., E], -1, 0, +1 as in a profile; None: every expert is shared.
    """
    before = rows.sum(-2)
    total = before.sum(-1)
    if config.is_off or np.isinf(config.gamma):
        return Cut(before.astype(float), np.zeros(total.shape), np.zeros(total.shape))
    num_bounds = rows.shape[-1] if config.scope == "expert" else num_ranks
    bound = _bound(rows, config, num_ranks, modality)
    per_bound = rows.reshape(*rows.shape[:-1], num_bounds, -1).sum(-1)  # [..., 2, NB]
    units = per_bound.sum(-2) if config.load == "rows" else per_bound[..., TEXT, :] + 0.5 * per_bound[..., VISUAL, :]
    over, room = np.maximum(units - bound, 0), np.maximum(bound - units, 0)
    clipped = np.minimum(_rows_of(over, per_bound, config), per_bound.sum(-2))
    moved, arriving = _reroute(over, room, clipped, config, num_ranks)
    kept = _spread(per_bound.sum(-2) - clipped, before)
    after = kept + _spread(arriving, before)
    return Cut(after, clipped.sum(-1), np.maximum(clipped.sum(-1) - moved, 0))


def _bound(rows: np.ndarray, config: MacsConfig, num_ranks: int, modality: np.ndarray | None) -> np.ndarray:
    """[..., NB] units, one unit a row of weight 1."""
    total = rows.sum((-2, -1))[..., None]
    unit = 1 if config.load == "rows" else 256
    if config.scope == "rank":
        bound = np.broadcast_to(config.gamma * total / num_ranks, (*total.shape[:-1], num_ranks))
        return np.floor(bound * unit) / unit
    visual, text = 0.5 * rows[..., VISUAL, :].sum(-1), rows[..., TEXT, :].sum(-1)
    share = np.divide(visual, visual + text, out=np.full(visual.shape, 0.5), where=visual + text > 0)[..., None]
    follow = 1.0 if modality is None else 1 + config.rho * modality * (share - 0.5)
    capacity = np.maximum(config.c_min, config.gamma * total / rows.shape[-1] * follow)
    return np.floor(np.broadcast_to(capacity, (*total.shape[:-1], rows.shape[-1])) * unit) / unit


def _rows_of(over: np.ndarray, per_bound: np.ndarray, config: MacsConfig) -> np.ndarray:
    """[..., NB] rows that must go for `over` units to go, visual tokens first under load=effective."""
    if config.load == "rows":
        return over
    visual = per_bound[..., VISUAL, :]
    share = np.divide(over, 0.5 * visual, out=np.zeros(over.shape), where=visual > 0)
    if config.importance == "entropy":  # the lightest go first, so more rows than units
        share = np.interp(share, *_lightest_first(config.delta))
    return np.minimum(share, 1.0) * visual + np.maximum(over - 0.5 * visual, 0)


def _lightest_first(delta: float) -> tuple[np.ndarray, np.ndarray]:
    """(share of the weight, share of the tokens) of the lightest tokens; z-scores taken as normal."""
    rank = (np.arange(4096) + 0.5) / 4096
    order = np.sort(np.random.default_rng(0).normal(size=1 << 18))
    weight = 1 / (1 + np.exp(-delta * np.quantile(order, rank)))
    gone = np.concatenate([[0.0], np.cumsum(weight)]) / weight.sum()
    return gone, np.linspace(0, 1, len(gone))


def _reroute(
    over: np.ndarray, room: np.ndarray, clipped: np.ndarray, config: MacsConfig, num_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """([...] rows that find room, [..., NB] where): overflow meets room over all bounds, or within each rank."""
    if config.reroute == "none" or config.reroute_rounds == 0:
        return np.zeros(over.shape[:-1]), np.zeros(over.shape)
    pools = num_ranks if config.reroute == "local" else 1

    def pooled(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:-1], pools, -1)

    wanted, free = pooled(over).sum(-1), pooled(room).sum(-1)
    share = np.divide(np.minimum(wanted, free), wanted, out=np.zeros(wanted.shape), where=wanted > 0)
    rows = pooled(clipped).sum(-1) * share
    where = np.divide(pooled(room), free[..., None], out=np.zeros(pooled(room).shape), where=free[..., None] > 0)
    return rows.sum(-1), (rows[..., None] * where).reshape(over.shape)


def _spread(per_bound: np.ndarray, before: np.ndarray) -> np.ndarray:
    """[..., NB] -> [..., E], in proportion to the rows that the experts of a bound had."""
    experts = before.reshape(*per_bound.shape, -1)
    total = experts.sum(-1, keepdims=True)
    share = np.divide(experts, total, out=np.full(experts.shape, 1 / experts.shape[-1]), where=total > 0)
    return (per_bound[..., None] * share).reshape(before.shape)

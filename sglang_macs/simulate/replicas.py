"""Redundant experts at the level of loads: where copies lie, and how many rows each gets (docs/design/method.md, 3b).

Rows are real numbers here, and experts with as many copies are poured by their index alone.
"""

import numpy as np

SWEEPS = 8


def placement(counts: np.ndarray, num_physical: int, num_ranks: int) -> np.ndarray:
    """[P] logical expert of each physical one, for loads counts [E], as EPLB goes about it: the copies of an expert
    share its load, the next copy is of the one whose copies have most, and copies are packed, the fullest first, onto
    the emptiest rank with a place left, where there is one without the expert.
    """
    copies = np.ones(len(counts), dtype=int)
    for _ in range(num_physical - len(counts)):
        copies[np.argmax(counts / copies)] += 1
    each = np.repeat(np.arange(len(counts)), copies)
    load, held = np.zeros(num_ranks), [[] for _ in range(num_ranks)]
    for expert in each[np.argsort(-(counts / copies)[each], kind="stable")]:
        free = [r for r in range(num_ranks) if len(held[r]) < num_physical // num_ranks]
        without = [r for r in free if expert not in held[r]] or free
        rank = min(without, key=lambda r: load[r])
        held[rank].append(int(expert))
        load[rank] += counts[expert] / copies[expert]
    return np.array([expert for of_rank in held for expert in of_rank])


def spread(rows: np.ndarray, mapped: np.ndarray, num_ranks: int, *, balance: bool) -> np.ndarray:
    """[B, 2, E] rows of each expert -> [B, 2, P] of each copy: as the plan balances every batch, or evenly."""
    total, width = rows.sum(1).astype(float), len(mapped) // num_ranks
    first = [{} for _ in range(rows.shape[-1])]
    for physical, expert in enumerate(mapped):
        first[expert].setdefault(physical // width, physical)  # further copies on a rank get nothing
    quota = np.zeros((len(rows), len(mapped)))
    load = np.zeros((len(rows), num_ranks))
    for expert, places in enumerate(first):
        for rank, physical in places.items():
            quota[:, physical] = total[:, expert] / len(places)
            load[:, rank] += quota[:, physical]
    replicated = sorted((e for e, places in enumerate(first) if len(places) > 1), key=lambda e: -len(first[e]))
    for _ in range(SWEEPS * balance):
        for expert in replicated:
            ranks, physical = list(first[expert]), list(first[expert].values())
            load[:, ranks] -= quota[:, physical]
            quota[:, physical] = _poured(total[:, expert], load[:, ranks])
            load[:, ranks] += quota[:, physical]
    share = np.divide(quota, total[:, mapped], out=np.zeros_like(quota), where=total[:, mapped] > 0)
    return rows[:, :, mapped] * share[:, None]


def _poured(rows: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """[B, c]: rows [B] onto ranks of loads [B, c], as water finds its level."""
    ascending = np.sort(loads, axis=1)
    levels = (rows[:, None] + ascending.cumsum(axis=1)) / np.arange(1, loads.shape[1] + 1)
    above = np.concatenate([ascending[:, 1:], np.full((len(rows), 1), np.inf)], axis=1)
    level = np.take_along_axis(levels, (levels <= above).argmax(axis=1)[:, None], axis=1)
    return np.maximum(level - loads, 0)

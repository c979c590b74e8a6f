"""Ratio of two run times on a noisy machine: samples in turn, the fastest of each round, medians over rounds.

Times are the process's own CPU time, so that being preempted costs nothing (and waiting is not seen: there is none in
what is measured). What other processes still do, through caches, memory and shared cores, makes a sample slower,
never faster. So of each round, a few neighbouring samples of both sides, the
fastest of each side are divided; frequency and memory pressure change more slowly than a round lasts and cancel. If
the rounds still disagree, they are made longer until they agree or the time is up.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from scipy import stats

ROUNDS = 9
SAMPLE_SECONDS = 0.001  # short, so that some samples find the machine quiet; long against the clock
MAD_WANTED = 0.015  # of the rounds' ratios: the standard error of the median of nine is then about 0.9 %


class TooNoisyError(RuntimeError):
    """The rounds did not agree in the time given."""


@dataclass(frozen=True)
class Ratio:
    """Time of ours over that of the reference. mad: median absolute deviation over rounds, as a share of the ratio."""

    value: float
    mad: float
    pairs_per_round: int
    ours_us: float
    reference_us: float


def measure(
    ours: Callable[[], object],
    reference: Callable[[], object],
    *,
    seconds: float = 30.0,
    clock: Callable[[], float] = time.process_time,
) -> Ratio:
    """Runs both in turn until the rounds agree. Raises TooNoisyError after `seconds` by `clock`."""
    start = clock()
    repeats = [_repeats(run, clock) for run in (ours, reference)]
    pairs: list[tuple[float, float]] = []
    per_round = 32
    while True:
        while len(pairs) < ROUNDS * per_round:
            pairs.append(_pair(ours, reference, repeats, clock, swap=len(pairs) % 2 == 1))
        found = summarise(pairs, per_round)
        if found.mad <= MAD_WANTED:
            return found
        if clock() - start > seconds:
            raise TooNoisyError(
                f"rounds of {per_round} pairs differ by {found.mad:.1%} after {clock() - start:.0f} s, "
                f"expected at most {MAD_WANTED:.1%}: end other work on this machine, or allow more --seconds"
            )
        per_round *= 2


def summarise(pairs: list[tuple[float, float]], per_round: int) -> Ratio:
    """pairs: seconds of (ours, reference) in the order taken."""
    rounds = [pairs[i : i + per_round] for i in range(0, len(pairs) - per_round + 1, per_round)]
    fastest = [tuple(min(side) for side in zip(*r, strict=True)) for r in rounds]
    ratios = [a / b for a, b in fastest]
    value = statistics.median(ratios)
    mad = float(stats.median_abs_deviation(ratios)) / value
    ours_us, reference_us = (statistics.median(side) * 1e6 for side in zip(*fastest, strict=True))
    return Ratio(value, mad, per_round, ours_us, reference_us)


def _pair(ours, reference, repeats, clock, *, swap: bool) -> tuple[float, float]:
    """One sample of each side, seconds a run. `swap` changes the order: what runs second finds other caches."""
    sides = [(ours, repeats[0]), (reference, repeats[1])]
    taken = [_sample(run, n, clock) for run, n in (reversed(sides) if swap else sides)]
    return tuple(reversed(taken)) if swap else tuple(taken)


def _sample(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def _repeats(run: Callable[[], object], clock: Callable[[], float]) -> int:
    """How many runs fill a sample, after two that warm up."""
    run()
    run()
    once = min(_sample(run, 1, clock) for _ in range(3))
    return max(1, round(SAMPLE_SECONDS / max(once, 1e-9)))

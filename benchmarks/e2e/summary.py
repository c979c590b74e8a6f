"""From the rounds of a cell (one size, one routing) to rows of the result file."""

from __future__ import annotations

import math
import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.check_serving import Interval, interval

OUTLIER = 1.5  # a run that takes so many times its variant's median is looked into and left out
FEWEST = 5  # runs: of fewer, none can be told from the rest
RESAMPLES = 2000
# What a log says where a run was held up by something that the next one does not have.
TELLING = re.compile(r".*(?:compil|ninja|nvcc|autotun|warm.?up|captur|retract|out of memory|error|exception).*", re.I)


@dataclass
class Samples:
    """Runs of one variant, a round each; None where a run is left out."""

    seconds: list[float | None] = field(default_factory=list)
    ttft: list[float | None] = field(default_factory=list)

    def add(self, seconds: float, ttft: float) -> None:
        self.seconds.append(seconds)
        self.ttft.append(ttft)

    def without_outliers(self) -> tuple[Samples, list[int]]:
        """A copy with None in the place of outlying runs, and which these are."""
        if len(self.seconds) < FEWEST:
            return self, []
        most = OUTLIER * statistics.median(self.seconds)
        out = [i for i, seconds in enumerate(self.seconds) if seconds > most]

        def kept(values: list[float | None]) -> list[float | None]:
            return [None if i in out else value for i, value in enumerate(values)]

        return Samples(kept(self.seconds), kept(self.ttft)), out

    def median_seconds(self) -> float:
        return statistics.median(s for s in self.seconds if s is not None)


def ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """Ours over theirs of the rounds that have both."""
    return [a / b for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]


def bounds(found: Interval) -> list[float] | None:
    """[low, high]; None where the rounds are too few for an interval."""
    return [found.low, found.high] if math.isfinite(found.high) else None


def share_of_ideal(
    base: Sequence[float | None], ours: Sequence[float | None], ideal: Sequence[float | None], seed: int = 0
) -> tuple[float | None, list[float] | None]:
    """(base - ours) / (base - ideal) of the median ratios to base, and its 95 % interval by resampling the rounds.

    (None, None) where the ideal is not faster: there is no gain to have a share of. The interval alone is None where
    that can be by chance.
    """
    rounds = [r for r in zip(base, ours, ideal, strict=False) if None not in r]
    if not rounds:
        return None, None
    pairs = [(b / a, c / a) for a, b, c in rounds]

    def share(sample: list[tuple[float, float]]) -> float | None:
        mine, best = (statistics.median(side) for side in zip(*sample, strict=True))
        return (1 - mine) / (1 - best) if best < 1 else None

    rng = random.Random(seed)
    drawn = [share(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES)]
    if (value := share(pairs)) is None:
        return None, None
    if None in drawn or len(pairs) < 6:  # as for `interval`: fewer bound nothing
        return value, None
    drawn.sort()
    return value, [drawn[int(0.025 * RESAMPLES)], drawn[int(0.975 * RESAMPLES) - 1]]


def row(case: dict, samples: Samples, stock: Samples, ideal: Samples | None, off: Samples | None, rest: dict) -> dict:
    """One row. ideal, off: the balanced variant and the preset off of the same dispatch, where they were measured."""
    time, ttft = (interval(ratios(getattr(samples, k), getattr(stock, k))) for k in ("seconds", "ttft"))
    made = {
        "op": "e2e_prefill",
        "case": case,
        "against": "stock",
        "ratio": time.median,
        "ci95": bounds(time),
        "ttft_ratio": ttft.median,
        "ttft_ci95": bounds(ttft),
        "rounds": time.pairs,
    }
    for name, base in (("share_of_ideal", stock), ("share_of_balance", off)):
        known = ideal and base and ideal.seconds and base.seconds
        found = share_of_ideal(base.seconds, samples.seconds, ideal.seconds) if known else (None, None)
        made[name], made[f"{name}_ci95"] = found
    return made | {"busy": None, "host_us_per_layer": None} | rest


# ---- Outliers ------------------------------------------------------------------------------------------------------


def reasons(run, full: bool, caches: list[Path], since_epoch: float, until_epoch: float) -> list[str]:
    """What can be found about a run that took long. run: rounds.Run; the times are those of the file system."""
    found = [] if full else ["passes were not full: " + pass_sizes(run.passes)]
    if names := compiled(caches, since_epoch, until_epoch):
        found.append(f"compiled {len(names)} files, such as {names[0]}")
    said = list(dict.fromkeys(line.strip()[:160] for line in TELLING.findall(run.log)))
    found += [f"the log: {line}" for line in said[:3]]
    if gap := longest_gap(run.passes, run.answered):
        found.append(gap)
    return found or ["nothing found"]


def pass_sizes(passes: list[list[tuple[float, int]]]) -> str:
    return "; ".join(", ".join(str(n) for _, n in rank if n) or "none" for rank in passes)


def compiled(caches: list[Path], since: float, until: float) -> list[str]:
    """Names of files in `caches` that were written between the two times."""
    return [
        file.name
        for cache in caches
        for file in cache.rglob("*")
        if file.is_file() and since <= file.stat().st_mtime <= until
    ]


def longest_gap(passes: list[list[tuple[float, int]]], answered: float) -> str:
    """Which pass of the slowest rank held the round up, if one did."""
    starts = [start for start, _ in max(passes, key=len, default=[])]
    lengths = [b - a for a, b in zip(starts, [*starts[1:], answered], strict=False)]
    if len(lengths) < 3 or max(lengths) < 2 * statistics.median(lengths):
        return ""
    return f"pass {lengths.index(max(lengths)) + 1} of {len(lengths)} took {max(lengths):.2f} s"

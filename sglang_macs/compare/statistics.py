"""Whether what was seen is more than noise. Blocks of requests are the unit: those of a block share batches, and with
them what batches do to answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95  # of the intervals that are shown
LOSS_LEVEL = 0.001  # chance of finding a loss where there is none, all measures together
NO_LOSS_LEVEL = 0.05  # chance of finding none where it is as large as allowed
RESAMPLES = 2000
EXACT = 14  # blocks of which every way to flip signs is tried; of more, FLIPS at random
FLIPS = 100_000
MOST_NEEDED = 1_000_000  # requests; beyond that no number is named


@dataclass(frozen=True)
class Estimate:
    """A mean over requests and its interval; NaN where there are no requests, or too few blocks for an interval."""

    mean: float
    low: float
    high: float


def estimate(values: np.ndarray, blocks: np.ndarray) -> Estimate:
    """Of values [N] of requests in blocks [N]; NaN values do not count. By resampling whole blocks."""
    known = ~np.isnan(values)
    if not known.any():
        return Estimate(math.nan, math.nan, math.nan)
    _, index = np.unique(blocks[known], return_inverse=True)
    sums, counts = np.bincount(index, values[known]), np.bincount(index)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Estimate(mean, math.nan, math.nan)
    drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean, float(low), float(high))


def block_means(values: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """[B] of values [N]; NaN values do not count, nor do blocks without any other."""
    known = ~np.isnan(values)
    _, index = np.unique(blocks[known], return_inverse=True)
    return np.bincount(index, values[known]) / np.bincount(index)


def sign_flip(values: np.ndarray) -> float:
    """Chance of a mean as large as that of values [B] if each could as well have had the other sign: the one-sided
    randomization test of "not above 0", which assumes symmetry and no distribution. 1 where there are none.
    """
    count = len(values)
    if count == 0:
        return 1.0
    if count <= EXACT:
        signs = 1 - 2 * ((np.arange(1 << count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (FLIPS, count), dtype=np.int8)
        signs[0] = 1  # what was seen is one of the ways: no chance is 0
    sums = signs @ values
    return float(np.mean(sums >= values.sum() - 1e-12 * np.abs(values).sum()))


@dataclass(frozen=True)
class Finding:
    """On one measure. status: 0 no loss, 1 a loss, 2 cannot be said; p_loss: of "none beyond the floor"; p_none: of "at
    least as much as is allowed"; needed: blocks that would tell, None where no reasonable number would.
    """

    status: int
    mean: float
    allowed: float
    p_loss: float
    p_none: float
    needed: int | None


def judge(excess: np.ndarray, allowed: float, measures: int = 1) -> Finding:
    """What block means [B] of a difference beyond the floor say.

    A loss: "none" is rejected at LOSS_LEVEL, shared among the measures, and the mean is above what is allowed. No loss:
    "at least what is allowed" is rejected at NO_LOSS_LEVEL.
    """
    p_loss, p_none = sign_flip(excess), sign_flip(allowed - excess)
    mean = float(excess.mean()) if len(excess) else math.nan
    loss = p_loss <= LOSS_LEVEL / measures and mean > allowed
    status = 1 if loss else 0 if p_none <= NO_LOSS_LEVEL else 2
    return Finding(status, mean, allowed, p_loss, p_none, _needed(excess, allowed, measures) if status == 2 else 0)


def fewest_blocks(measures: int = 1) -> int:
    """With fewer, no loss could be found whatever is seen."""
    return math.ceil(math.log2(measures / LOSS_LEVEL))


def _needed(excess: np.ndarray, allowed: float, measures: int) -> int | None:
    """Blocks by the normal approximation, if more are like these."""
    fewest = fewest_blocks(measures)
    if len(excess) < 3:
        return fewest
    # A loss is found at its distance from 0, a mean below what is allowed at its distance from that.
    loss = excess.mean() > allowed
    level, distance = (LOSS_LEVEL / measures, excess.mean()) if loss else (NO_LOSS_LEVEL, allowed - excess.mean())
    if distance <= 0:
        return None
    blocks = math.ceil((_quantile(1 - level) * float(excess.std(ddof=1)) / distance) ** 2)
    return max(blocks, fewest, len(excess) + 1) if blocks < MOST_NEEDED else None


def _quantile(share: float) -> float:
    """Of the standard normal distribution."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(share)


def thirds(values: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of values, both ends inclusive, with about a third of them each; fewer where many are alike."""
    ordered = sorted(values)
    if not ordered:
        return []
    ends = sorted({ordered[(len(ordered) * k) // 3 - 1] for k in (1, 2, 3)})
    return list(zip([ordered[0], *(end + 1 for end in ends[:-1])], ends, strict=True))

"""Figures and intervals of what methods did to batches."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from lab import lab_methods

MASTERED = 0.9  # unclipped accuracy from which on a task counts: what is not learned cannot be lost
LEARNED = 0.5  # the same for tasks that are made to be hard
RESAMPLES = 2000
COUNTS = ("visual", "text", "visual_clipped", "text_clipped", "visual_dropped", "text_dropped")


@dataclass
class Tally:
    """What one method did at one bound. Lists have one entry per batch."""

    right: list[dict[str, int]] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)  # fullest rank over the mean, mean over layers
    after: list[float] = field(default_factory=list)  # the same, worst layer, over the unclipped mean
    error: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))


@dataclass
class Findings:
    """Of some cases: seed, mix, unclipped right answers and questions by task of each, and every method's tally."""

    seeds: list[int] = field(default_factory=list)
    mixes: list[str] = field(default_factory=list)
    right: list[dict[str, int]] = field(default_factory=list)
    asked: list[dict[str, int]] = field(default_factory=list)
    tallies: dict[tuple[str, float | None], Tally] = field(default_factory=dict)

    def to_json(self) -> dict:
        lists = {name: getattr(self, name) for name in ("seeds", "mixes", "right", "asked")}
        return {**lists, "tallies": [[*key, asdict(tally)] for key, tally in self.tallies.items()]}

    @staticmethod
    def from_json(raw: dict) -> "Findings":
        tallies = {(name, bound): Tally(**tally) for name, bound, tally in raw["tallies"]}
        return Findings(**{**raw, "tallies": tallies})

    def extend(self, other: "Findings") -> None:
        """Adds another worker's cases."""
        for name in ("seeds", "mixes", "right", "asked"):
            getattr(self, name).extend(getattr(other, name))
        for key, tally in other.tallies.items():
            mine = self.tallies.setdefault(key, Tally())
            for name in ("right", "kl", "before", "after", "error", "seconds"):
                getattr(mine, name).extend(getattr(tally, name))
            for name, count in tally.counts.items():
                mine.counts[name] += count


SHOWN = ("gate", "cai", "paper", "visual top-k", "skipping", "gate x redundancy", "random")


def so_far(found: Findings) -> str:
    """Unclipped accuracy, and the divergence of some methods at the bound nearest to 1.05."""
    right, asked = (sum(sum(row.values()) for row in rows) for rows in (found.right, found.asked))
    bounds = [bound for _, bound in found.tallies if bound is not None]
    at = min(bounds, key=lambda bound: abs(bound - 1.05))
    of = {name: tally.kl for (name, bound), tally in found.tallies.items() if bound == at and name in SHOWN}
    kl = ", ".join(f"{name} {sum(values) / len(values):.1e}" for name, values in of.items())
    return f"unclipped {100 * right / max(asked, 1):.1f} % right; KL at {at:g}: {kl}"


class Statistics:
    """Confidence intervals by resampling whole batches, paired with the unclipped model.

    Not by scipy.stats.bootstrap: all methods share the resamples, so that differences between them are paired, too.
    """

    def __init__(
        self,
        seeds: list[int],
        mixes: list[str],
        base: list[dict[str, int]],
        asked: list[dict[str, int]],
        learned: float = MASTERED,
    ):
        self.seeds, self.mixes = np.array(seeds), np.array(mixes)
        self.tasks = sorted({task for row in asked for task in row})
        self.base, self.asked = self.table(base), self.table(asked)  # [batches, tasks]
        accuracy = self.base.sum(0) / self.asked.sum(0)
        self.mastered = accuracy >= learned if (accuracy >= learned).any() else accuracy >= 0
        random = np.random.default_rng(0)
        self.samples = random.integers(0, len(seeds), (RESAMPLES, len(seeds)))

    def table(self, rows: list[dict[str, int]]) -> np.ndarray:
        return np.array([[row.get(t, 0) for t in self.tasks] for row in rows], dtype=float)

    def accuracy(self, right: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """[..., tasks] of the batches `rows` [..., batches]."""
        return right[rows].sum(-2) / np.maximum(self.asked[rows].sum(-2), 1)

    def score(self, right: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Mean over the mastered tasks that `rows` ask."""
        asked = (self.asked[rows].sum(-2) > 0) & self.mastered
        return (self.accuracy(right, rows) * asked).sum(-1) / asked.sum(-1)

    def kept(self, right: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Score over the unclipped model's; 1 where that has none, and there is nothing to lose."""
        score, base = np.asarray(self.score(right, rows)), np.asarray(self.score(self.base, rows))
        return np.divide(score, base, out=np.ones_like(base), where=base > 0)

    def kept_at(self, right: np.ndarray, which: np.ndarray) -> float:
        """Of some batches."""
        return round(float(self.kept(right, np.flatnonzero(which))), 5)

    def interval(self, values: np.ndarray) -> list[float]:
        return [round(float(x), 5) for x in np.quantile(values, (0.025, 0.975))]

    def kl_ratio(self, kl: Sequence[float], reference: Sequence[float]) -> list[float]:
        """Of two methods' divergence of the answers, with its interval; both have one value a batch."""
        ours, theirs = np.array(kl), np.array(reference)
        spread = ours[self.samples].mean(-1) / np.maximum(theirs[self.samples].mean(-1), 1e-12)
        return [round(float(ours.mean() / max(theirs.mean(), 1e-12)), 3), *self.interval(spread)]

    def summary(self, right: list[dict[str, int]], reference: list[dict[str, int]] | None = None) -> dict:
        """Accuracy by task, what is kept of the unclipped score, by seed and with 95 % intervals.

        reference: another method's counts; then also what this one keeps more than that.
        """
        table, everything = self.table(right), np.arange(len(self.seeds))
        accuracy = self.accuracy(table, everything)
        spread = self.accuracy(table, self.samples)  # [RESAMPLES, tasks]
        found = {
            "accuracy": {
                t: [round(float(accuracy[i]), 5), *self.interval(spread[:, i])] for i, t in enumerate(self.tasks)
            },
            "score": [
                round(float(self.score(table, everything)), 5),
                *self.interval(self.score(table, self.samples)),
            ],
            "kept": [round(float(self.kept(table, everything)), 5), *self.interval(self.kept(table, self.samples))],
            "kept_by_seed": {str(s): self.kept_at(table, self.seeds == s) for s in sorted(set(self.seeds.tolist()))},
            "kept_by_mix": {m: self.kept_at(table, self.mixes == m) for m in sorted(set(self.mixes.tolist()))},
        }
        if reference is not None:
            other = self.table(reference)
            more = self.kept(table, self.samples) - self.kept(other, self.samples)
            found["kept_more_than_default"] = [
                round(float(self.kept(table, everything) - self.kept(other, everything)), 5),
                *self.interval(more),
            ]
        return found


def row_of(name: str, bound: float | None, tally: Tally, statistics: Statistics, reference: Tally | None) -> dict:
    """One line of the results."""
    counts = tally.counts
    share = {
        f"{m}_{what}": round(counts[f"{m}_{what}"] / max(counts[m], 1), 5)
        for m in ("visual", "text")
        for what in ("clipped", "dropped")
    }
    both = counts["visual"] + counts["text"]
    over = {} if reference is None else {"kl_over_default": statistics.kl_ratio(tally.kl, reference.kl)}
    return {
        "method": name,
        "bound": bound,
        **statistics.summary(tally.right, None if reference is None else reference.right),
        "kl": round(float(np.mean(tally.kl)), 6),
        **over,
        "layer_error": round(float(np.mean(tally.error)), 5) if tally.error else None,
        "share": {
            **share,
            "clipped": round((counts["visual_clipped"] + counts["text_clipped"]) / max(both, 1), 5),
            "dropped": round((counts["visual_dropped"] + counts["text_dropped"]) / max(both, 1), 5),
        },
        "max_rank_rows_before": round(float(np.mean(tally.before)), 4),
        "max_rank_rows_after": {"mean": round(float(np.mean(tally.after)), 4), "worst": round(max(tally.after), 4)},
        "milliseconds_per_layer": round(1e3 * float(np.mean(tally.seconds or [0.0])), 3),
    }


def table_of(found: Findings, learned: float = MASTERED) -> dict:
    """Rows for every (method, bound) found, and the unclipped model's."""
    statistics = Statistics(found.seeds, found.mixes, found.right, found.asked, learned)
    rows = []
    for (name, bound), tally in found.tallies.items():
        reference = found.tallies.get((lab_methods.DEFAULT, bound)) if name != lab_methods.DEFAULT else None
        rows.append(row_of(name, bound, tally, statistics, reference))
    mastered = [t for t, m in zip(statistics.tasks, statistics.mastered, strict=True) if m]
    return {
        "batches": len(found.seeds),
        "requests": int(statistics.asked.sum()),
        "mastered": mastered,
        "rows": sorted(rows, key=lambda r: (r["bound"] or 0.0, -r["kept"][0])),
    }


def merged(shards: Sequence[dict]) -> dict:
    """The results of all workers' files: tables in place of findings."""
    whole = ("drift", "entropy")  # parts that one worker has alone
    result = {key: value for key, value in shards[0].items() if key not in ("findings", *whole)}
    for name in shards[0]["findings"]:
        found = Findings()
        for shard in shards:
            found.extend(Findings.from_json(shard["findings"][name]))
        if found.seeds:
            result[name] = table_of(found, result.get("learned", MASTERED))
    return result | {key: shard[key] for shard in shards for key in whole if key in shard}

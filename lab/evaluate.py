"""What clipping costs: the lab's model under every method, at equal rows of the fullest rank.

    python lab/evaluate.py [--reduced]        # reduced: 15 minutes on two CPU cores

Batches of mixed requests, their tokens on R = 8 virtual source ranks, go through the model; at every MoE layer the
product's operators (or a baseline) decide what is dispatched. All methods get the same requests, so they are paired.
Writes docs/results/quality.json (reduced: quality_reduced.json), which lab/plot.py turns into pictures and
tables.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lab_calibration
import lab_checkpoint
import lab_material
import lab_methods
import lab_replicas
import lab_result
import numpy as np
import torch
from lab_judge import RANKS, as_batch, by_task, exact
from lab_methods import Inputs, Layout, Method, Outcome, rank_rows
from lab_model import Embedded, LabModel, Routing
from lab_pictures import TOKEN
from lab_tasks import NO_LABEL, Group, Maker
from lab_tokens import Vocabulary
from torch import Tensor

from sglang_macs.plan import profile

# Batches by turns from three mixes of requests. Experts are balanced over training; as in production, it is traffic
# that differs from it which fills some ranks more than others.
MIXES = {
    "training": {
        "text": {"copy": 6, "lookup": 10, "add": 6},
        "tiny": {"map": 10},
        "wide": {"read": 10, "compare": 4, "colour": 6, "where": 4},
        "square": {"read": 4, "count": 4, "count_colour": 6, "colour": 6, "where": 6, "compare": 4},
        "large": {"read": 4, "count": 2, "colour": 3, "where": 3, "scene": 3},
        "huge": {"read": 2},
    },
    "documents": {  # strings to read
        "text": {"copy": 12, "lookup": 8},
        "wide": {"read": 30, "compare": 8},
        "large": {"read": 6},
        "huge": {"read": 3},
    },
    "pictures": {  # large pictures
        "text": {"copy": 8, "lookup": 16},
        "square": {"count": 8, "count_colour": 8, "colour": 8, "where": 8},
        "large": {"scene": 4, "count": 4, "colour": 6, "where": 6, "read": 3},
        "huge": {"read": 2, "colour": 2, "where": 2},
    },
}
MASTERED = 0.9  # unclipped accuracy from which on a task counts: what is not learned cannot be lost
BOUNDS = (1.0, 1.05, 1.1, 1.2, 1.5)
STRESS = (0.5, 0.7, 0.85)  # below the mean: where methods part
RESAMPLES = 2000
SWEPT_AT = 0.7
IMPORTANCE_AT = (0.7, 1.0, 1.05)
REDUCED_IMPORTANCE_AT = (0.7, 1.05)
PARTS = ("main", "stress", "sweeps", "replicas", "importance", "drift")
# Sweeps, one option at a time: by importance, the preset and its options.
SWEEPS = {
    "entropy_gate": ("rank", {"delta": (0.0, 0.5, 1.0, 2.0, 4.0), "alpha": (0.0, 0.5, 1.0, 2.0, 4.0)}),
    "gate": ("rank", {"alpha": (0.0, 1.0, 4.0), "reroute_rounds": (1, 4, 8), "buckets": (32, 128, 256)}),
    "entropy": ("paper", {"rho": (0.0, 0.25, 0.5, 1.0), "delta": (0.0, 1.0, 4.0)}),
}


@dataclass(frozen=True)
class Case:
    """One batch on the device, with the unclipped model's answers.

    groups; embedded; layout; answers: log-probabilities [A, V] at the answers' tokens; right answers by task and size;
    peaks: by layer, rows of the fullest rank over the mean.
    """

    seed: int
    mix: str
    groups: list[Group]
    embedded: Embedded
    layout: Layout
    answers: Tensor
    right: dict[str, list[bool]]
    peaks: list[float]
    top_k: int


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


COUNTS = ("visual", "text", "visual_clipped", "text_clipped", "visual_dropped", "text_dropped")


class Judge:
    """The seam of one forward pass: lets `method` decide on the planned tokens and records what it did."""

    def __init__(self, model: LabModel, case: Case, method: Method, bound: float, tally: Tally, with_error: bool):
        self.model, self.layout, self.method, self.bound = model, case.layout, method, bound
        self.tally, self.with_error = tally, with_error
        self.after, self.before, self.seconds = [], [], []

    def __call__(self, routing: Routing) -> tuple[Tensor, Tensor]:
        given = inputs_of(routing, self.layout)
        outcome = self.method.decide(given, self.bound)
        ids, weights = routing.ids.clone(), routing.weights.clone()
        ids[self.layout.tokens], weights[self.layout.tokens] = outcome.ids, outcome.weights
        self._count(given, outcome)
        self.seconds.append(outcome.seconds)
        if self.with_error:
            self._measure_error(routing, ids, weights)
        return ids, weights

    def _count(self, given: Inputs, outcome: Outcome) -> None:
        ids, experts = outcome.ids, given.num_experts
        rows = rank_rows(ids, experts) if outcome.rows is None else outcome.rows
        mean = given.ids.numel() / RANKS
        self.before.append(float(rank_rows(given.ids, experts).max()) / mean)
        self.after.append(float(rows.max()) / mean)
        for name, which in (("visual", given.visual), ("text", ~given.visual)):
            self.tally.counts[name] += int(which.sum()) * ids.shape[1]
            self.tally.counts[f"{name}_clipped"] += int((ids != given.ids)[which].sum())
            self.tally.counts[f"{name}_dropped"] += int((ids < 0)[which].sum())

    def _measure_error(self, routing: Routing, ids: Tensor, weights: Tensor) -> None:
        experts = self.model.model["language_model"].layers[routing.layer].mlp.experts
        whole = experts(routing.hidden, routing.ids, routing.weights, self.model.experts_by)[self.layout.tokens]
        clipped = experts(routing.hidden, ids, weights, self.model.experts_by)[self.layout.tokens]
        self.tally.error.append(float((clipped - whole).norm() / whole.norm()))

    def close(self) -> None:
        self.tally.before.append(sum(self.before) / len(self.before))
        self.tally.after.append(max(self.after))
        self.tally.seconds.append(sum(self.seconds) / len(self.seconds))


def inputs_of(routing: Routing, layout: Layout) -> Inputs:
    """The planned tokens' part of a routing."""
    parts = (routing.hidden, routing.logits, routing.ids, routing.weights)
    received = None if routing.received is None else routing.received[layout.tokens]
    return Inputs(routing.layer, *(x[layout.tokens].contiguous() for x in parts), layout, received)


def lay_out(groups: Sequence[Group], entropy_scope: str = "batch") -> Layout:
    """Requests on ranks: shuffled, then dealt out by turns, as a balancing router would; prompts alone are planned."""
    device = groups[0].ids.device
    source, start = [], 0
    for g in groups:
        n, width = g.ids.shape
        column = torch.arange(width, device=device)
        image = (column >= 4) & (column < 4 + (0 if g.size is None else g.size.tokens))
        planned = column < g.prompt[:, None]
        place = start + torch.arange(n * width, device=device).view(n, width)
        source.append((place[planned], image.expand(n, -1)[planned], planned.sum(1), _detail(g)[planned]))
        start += n * width
    tokens, visual, lengths, detail = (torch.cat(x) for x in zip(*source, strict=True))
    order = torch.randperm(len(lengths)).to(device)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(lengths), device=device) % RANKS
    rank_of = rank.repeat_interleave(lengths)
    request_of = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    by_rank = rank_of.argsort(stable=True)
    segment = torch.where(visual, request_of if entropy_scope == "image" else 0, -1).int()
    segments = len(lengths) if entropy_scope == "image" else 1
    sizes = torch.bincount(rank_of, minlength=RANKS).tolist()
    return Layout(tokens[by_rank], sizes, segment[by_rank], segments, detail[by_rank])


def _detail(group: Group) -> Tensor:
    """[n, L] f32: the pixels' standard deviation within a visual token, over 64 levels and at most 1; 1 for text."""
    n, width = group.ids.shape
    found = torch.ones(n, width, device=group.ids.device)
    if group.size is not None:
        squares = group.pictures.unfold(2, TOKEN, TOKEN).unfold(3, TOKEN, TOKEN)  # [n, 3, rows, columns, 16, 16]
        spread = squares.flatten(4).std(-1).mean(1).flatten(1)
        found[:, 4 : 4 + group.size.tokens] = (spread / 64).clamp(max=1.0)
    return found


@dataclass(frozen=True)
class Course:
    """What cases are made from, and how models run."""

    model: LabModel
    make: Maker
    dtype: torch.dtype
    seeds: Sequence[int]
    seconds: float  # begin no case after this long

    def specs(self, batches: int) -> list[tuple[int, int, int]]:
        """(index, seed, number of the mix) of every case."""
        return [(i, seed, mix) for i in range(batches) for seed in self.seeds for mix in range(len(MIXES))]

    def case(self, index: int, seed: int, number: int) -> Case:
        """Pictures are drawn on the CPU, so a seed means the same everywhere."""
        name = list(MIXES)[number]
        torch.manual_seed(10_000 * seed + 10 * index + number)
        device, arch = next(self.model.parameters()).device, self.model.arch
        groups = [g.to(device) for g in self.make.batch(MIXES[name])]
        embedded = self.model.embed([as_batch(g) for g in groups], self.dtype)
        logits, routings = self.model.decode(embedded, None, self.dtype)
        right = by_task(groups, [exact(x, g.labels) for x, g in zip(logits, groups, strict=True)])
        layout = lay_out(groups)
        rows = [rank_rows(r.ids[layout.tokens], arch.experts) for r in routings]
        peaks = [float(r.max() * RANKS / r.sum()) for r in rows]
        return Case(seed, name, groups, embedded, layout, answer_logits(logits, groups), right, peaks, arch.top_k)


def answer_logits(logits: list[Tensor], groups: Sequence[Group]) -> Tensor:
    """[A, V] log-probabilities at the tokens of the answers."""
    asked = [x[g.labels != NO_LABEL] for x, g in zip(logits, groups, strict=True)]
    return torch.log_softmax(torch.cat(asked), -1)


def judge(model: LabModel, case: Case, method: Method, bound: float, tally: Tally, dtype, with_error: bool) -> None:
    """One forward pass of one method, added to `tally`."""
    if bound >= max(case.peaks) and method.acts_above_bound_only:
        _skip(case, tally)
        return
    seam = Judge(model, case, method, bound, tally, with_error)
    logits, _ = model.decode(case.embedded, seam, dtype)
    seam.close()
    right = by_task(case.groups, [exact(x, g.labels) for x, g in zip(logits, case.groups, strict=True)])
    tally.right.append(_by_name(right))
    now = answer_logits(logits, case.groups)
    tally.kl.append(float((case.answers.exp() * (case.answers - now)).sum(-1).mean()))


def _skip(case: Case, tally: Tally) -> None:
    """No rank of any layer is over the bound: the batch passes unchanged, whatever the method."""
    tally.right.append(_by_name(case.right))
    tally.kl.append(0.0)
    tally.before.append(sum(case.peaks) / len(case.peaks))
    tally.after.append(max(case.peaks))
    for name, which in (("visual", case.layout.segment >= 0), ("text", case.layout.segment < 0)):
        tally.counts[name] += int(which.sum()) * case.top_k * len(case.peaks)


def _by_name(right: dict[str, list[bool]]) -> dict[str, int]:
    """Right answers by task, whatever the picture's size."""
    found: dict[str, int] = {}
    for name, rows in right.items():
        task = name.split("/")[0]
        found[task] = found.get(task, 0) + sum(rows)
    return found


class Statistics:
    """Confidence intervals by resampling whole batches, paired with the unclipped model.

    Not by scipy.stats.bootstrap: all methods share the resamples, so that differences between them are paired, too.
    """

    def __init__(self, seeds: list[int], mixes: list[str], base: list[dict[str, int]], asked: list[dict[str, int]]):
        self.seeds, self.mixes = np.array(seeds), np.array(mixes)
        self.tasks = sorted({task for row in asked for task in row})
        self.base, self.asked = self.table(base), self.table(asked)  # [batches, tasks]
        accuracy = self.base.sum(0) / self.asked.sum(0)
        self.mastered = accuracy >= MASTERED if (accuracy >= MASTERED).any() else accuracy >= 0
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
        """Score over the unclipped model's."""
        return self.score(right, rows) / self.score(self.base, rows)

    def kept_at(self, right: np.ndarray, which: np.ndarray) -> float:
        """Of some batches."""
        return round(float(self.kept(right, np.flatnonzero(which))), 5)

    def interval(self, values: np.ndarray) -> list[float]:
        return [round(float(x), 5) for x in np.quantile(values, (0.025, 0.975))]

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
    return {
        "method": name,
        "bound": bound,
        **statistics.summary(tally.right, None if reference is None else reference.right),
        "kl": round(float(np.mean(tally.kl)), 6),
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


@dataclass(frozen=True)
class Part:
    """One table of the results: `plans` on `batches` cases of every seed and mix, the first `errors` of a worker with
    the layers' output errors.
    """

    batches: int
    plans: list[tuple[Method, float]]
    errors: int = 0
    records_attention: bool = False


Work = list[tuple[str, tuple[int, int, int]]]  # (part, case)


def work_of(course: Course, parts: dict[str, Part]) -> Work:
    """(part, case) in an order in which all parts progress alike: a run that is cut off has some of each."""
    work = []
    for name, part in parts.items():
        specs = course.specs(part.batches)
        work += [((i + 0.5) / len(specs), name, spec) for i, spec in enumerate(specs)]
    return [(name, spec) for _, name, spec in sorted(work, key=lambda x: x[0])]


def share_of(work: Work, index: int, of: int) -> Work:
    """One worker's share: cases of each part by turns, since parts cost differently; the next part begins at the next
    worker, since so do mixes.
    """
    turns: dict[str, int] = {}
    mine = []
    for name, spec in work:
        turn = turns.setdefault(name, len(turns))
        turns[name] += 1
        if turn % of == index:
            mine.append((name, spec))
    return mine


@torch.no_grad()
def run_work(course: Course, parts: dict[str, Part], work: Work, keep: Callable[[dict], None]) -> dict[str, Findings]:
    """Every plan of the part, and the unclipped model, on every case; `keep` gets what is known after each."""
    found, start = {name: Findings() for name in parts}, time.perf_counter()
    for done, (name, spec) in enumerate(work):
        seconds = time.perf_counter() - start
        if seconds > course.seconds:
            break
        run_case(course, course.case(*spec), parts[name], found[name])
        print(f"  {name} {spec}: {done + 1} of {len(work)}, {time.perf_counter() - start:.0f} s", flush=True)
        keep(found)
    return found


def run_case(course: Course, case: Case, part: Part, found: Findings) -> None:
    """One case under every plan of the part, added to `found`."""
    with_error = len(found.seeds) < part.errors
    unclipped = Method("unclipped", lab_methods.keep_all, acts_above_bound_only=False)
    course.model.records_attention = part.records_attention
    for method, bound in [(unclipped, None), *part.plans]:
        tally = found.tallies.setdefault((method.name, bound), Tally())
        judge(course.model, case, method, bound or 0.0, tally, course.dtype, with_error)
    found.seeds.append(case.seed)
    found.mixes.append(case.mix)
    found.right.append(_by_name(case.right))
    found.asked.append(_by_name({k: [True] * len(v) for k, v in case.right.items()}))


def table_of(found: Findings) -> dict:
    """Rows for every (method, bound) found, and the unclipped model's."""
    statistics = Statistics(found.seeds, found.mixes, found.right, found.asked)
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
    result = {key: value for key, value in shards[0].items() if key not in ("findings", "drift")}
    for name in shards[0]["findings"]:
        found = Findings()
        for shard in shards:
            found.extend(Findings.from_json(shard["findings"][name]))
        if found.seeds:
            result[name] = table_of(found)
    drifts = [shard["drift"] for shard in shards if "drift" in shard]
    return {**result, **({"drift": drifts[0]} if drifts else {})}


def sweep_plans(modality: dict, scoring: str) -> list[tuple[Method, float]]:
    """One option of a preset at a time."""
    plans = []
    for importance, (preset, options) in SWEEPS.items():
        for option, values in options.items():
            for value in values:
                made = {"preset": preset, "importance": importance, option: value}
                name = f"{'paper' if preset == 'paper' else importance} {option}={value}"
                plans.append((Method(name, lab_methods.WithPlan(made, modality, scoring=scoring)), SWEPT_AT))
    return plans


def importance_plans(
    model: LabModel, norms: Tensor, modality: dict, bounds: Sequence[float]
) -> list[tuple[Method, float]]:
    """Other measures of what may be given up, each with re-routing, without, and without protecting text."""
    measures = {
        "gate": lambda given, weight: given.weights,
        "gate x mean norm": lab_methods.ByMeanNorm(norms),
        "gate x true norm": lab_methods.ByNorm(lab_calibration.true_norms(model)),
        "gate x redundancy": lab_methods.redundancy,
        "gate x detail": lab_methods.detail,
        "gate x attention": lab_methods.attention_received,
        "gate / entropy weight": lab_methods.inverse_entropy,
    }
    changes = {
        "": {},
        " -reroute": {"reroute": "none"},
        " -protection -reroute": {"reroute": "none", "protect_text": False},
    }
    plans = []
    for bound in bounds:
        made = lab_methods.WithPlan({"importance": "entropy_gate"}, modality, scoring=model.arch.scoring)
        plans.append((Method("entropy_gate", made), bound))
        for name, measure in measures.items():
            for suffix, options in changes.items():
                made = lab_methods.WithPlan(options, modality, measure, model.arch.scoring)
                plans.append((Method(name + suffix, made), bound))
        for name, slope in (("gate, tighter early", 0.05), ("gate, tighter late", -0.05)):
            inner = lab_methods.WithPlan({"importance": "gate"}, modality, scoring=model.arch.scoring)
            made = lab_methods.ByLayer(inner, slope, model.arch.layers)
            plans.append((Method(name, made, acts_above_bound_only=False), bound))
    return plans


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=lab_checkpoint.CHECKPOINT)
    parser.add_argument("--material", type=Path, help="of lab_material.py, where scikit-learn is missing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: docs/results/quality.json or quality_reduced.json")
    parser.add_argument("--reduced", action="store_true", help="fewer batches, bounds 1.0, 1.05 and 1.2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, help="per seed and mix (default 8; reduced 1)")
    parser.add_argument("--sweep-batches", type=int, help="the same for the other parts (4; 1)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after this long")
    parser.add_argument("--workers", type=int, help="processes (default: the CPU's cores; 6 on a GPU)")
    parser.add_argument("--bounds", type=float, nargs="*")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--shard", help="I/N: only every N-th case from the I-th on, findings kept beside --out")
    parser.add_argument("--merge", action="store_true", help="only put together what workers have left beside --out")
    options = parser.parse_args(arguments)
    name = "quality_reduced.json" if options.reduced else "quality.json"
    options.out = options.out or lab_checkpoint.ROOT / "docs" / "results" / name
    options.workers = options.workers or (6 if options.device.startswith("cuda") else os.cpu_count())
    options.bounds = options.bounds or ((1.0, 1.05, 1.2) if options.reduced else BOUNDS)
    options.batches = options.batches or (1 if options.reduced else 8)
    options.sweep_batches = options.sweep_batches or (1 if options.reduced else 4)
    return options


def shard_file(out: Path, index: int) -> Path:
    return out.with_suffix(f".shard-{index}.json")


def shard_files(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.stem}.shard-*.json"))


def parts_of(options: argparse.Namespace, course: Course, other: Maker, modality: dict) -> dict[str, Part]:
    """What is asked for, by name."""
    count, few = options.batches, options.sweep_batches
    errors = 1 if options.reduced else 2
    compared = lab_methods.methods(modality, course.model.arch.scoring)
    parts = {
        "main": Part(count, [(m, b) for b in options.bounds for m in compared], errors),
        "stress": Part(few, [(m, b) for b in STRESS for m in compared], errors),
        "sweeps": Part(few, sweep_plans(modality, course.model.arch.scoring)),
    }
    if "replicas" not in options.skip:
        recorded = lab_calibration.record(course.model, other, {}, 0, course.dtype).recording.rows.sum((0, 3))
        placed = lab_replicas.methods(recorded, modality, course.model.arch.scoring)
        parts["replicas"] = Part(few, [(m, b) for b in (*STRESS, *options.bounds) for m in placed], errors)
    if "importance" not in options.skip:
        norms = lab_calibration.record(course.model, other, MIXES["training"], batches=2, dtype=course.dtype).norms
        bounds = REDUCED_IMPORTANCE_AT if options.reduced else IMPORTANCE_AT
        parts["importance"] = Part(few, importance_plans(course.model, norms, modality, bounds), errors, True)
    return {name: part for name, part in parts.items() if name not in options.skip}


@torch.no_grad()
def run_shard(options: argparse.Namespace, index: int, of: int) -> None:
    """One worker's cases; its findings are on disk after each."""
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # the cores are the workers'
    dtype = torch.float32  # also on a GPU: what is measured is clipping, not rounding
    model = lab_checkpoint.load(options.checkpoint, device)
    model.experts_by = "dense" if device.type == "cuda" else "loop"
    words = Vocabulary(options.checkpoint / "tokenizer.json")
    make = Maker(words, lab_material.load("held_out", path=options.material), "held_out")
    other = Maker(words, lab_material.load("train", path=options.material, variants=2), "train")
    calibrated = profile.load(str(options.checkpoint / "profile.json"))  # recorded on the training digits
    modality = {layer: calibrated.of_layer(layer) for layer in range(model.arch.layers)}
    course = Course(model, make, dtype, range(options.seeds), options.seconds)
    parts = parts_of(options, course, other, modality)
    result = {
        "schema": "sglang-macs/quality/1",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "reduced": options.reduced,
        "ranks": RANKS,
        "seeds": list(range(options.seeds)),
        "mixes": MIXES,
        "architecture": asdict(model.arch),
    }

    def keep(found: dict[str, Findings]) -> None:
        raw = {**result, "findings": {name: f.to_json() for name, f in found.items()}}
        whole = shard_file(options.out, index)
        new = whole.with_suffix(".new")
        new.write_text(json.dumps(raw))
        os.replace(new, whole)

    found = run_work(course, parts, share_of(work_of(course, parts), index, of), keep)
    if index == 0 and "drift" not in options.skip:
        result["drift"] = lab_calibration.drift(model, make, other, dtype)
    keep(found)


def run_workers(options: argparse.Namespace) -> None:
    """As many processes as asked for, each with its share of the cases; a GPU cannot be shared by forking."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for old in shard_files(options.out):
        old.unlink()
    command = [sys.executable, __file__, *sys.argv[1:], "--shard"]
    workers = [subprocess.Popen([*command, f"{i}/{options.workers}"]) for i in range(options.workers)]
    failed = [w.args[-1] for w in workers if w.wait() != 0]
    if failed:
        print(f"workers {', '.join(failed)} failed; what they had found counts", flush=True)


def main() -> None:
    options = options_of()
    if options.shard:
        return run_shard(options, *map(int, options.shard.split("/")))
    start = time.perf_counter()
    if not options.merge:
        run_workers(options)
    files = shard_files(options.out)
    if not files:
        raise SystemExit(f"nothing to merge: no {options.out.stem}.shard-*.json in {options.out.parent}")
    result = {**merged([json.loads(f.read_text()) for f in files]), "seconds": round(time.perf_counter() - start, 1)}
    lab_result.write(options.out, result)
    print(f"wrote {options.out} ({result['seconds']:.0f} s)")
    print_summary(result)


def print_summary(result: dict) -> None:
    """The lines that matter most."""
    for row in [row for part in ("main", "replicas") if part in result for row in result[part]["rows"]]:
        if row["bound"] in (None, 1.0, 1.05):
            kept, low, high = (100 * x for x in row["kept"])
            print(
                f"{row['bound'] or '':>5} {row['method']:<22} kept {kept:6.2f} % [{low:.2f}, {high:.2f}]  "
                f"KL {row['kl']:.4f}  clipped {100 * row['share']['clipped']:.1f} %  "
                f"worst {row['max_rank_rows_after']['worst']:.3f}"
            )


if __name__ == "__main__":
    main()

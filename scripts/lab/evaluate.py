"""What clipping costs: the lab's model under every method, at equal rows of the fullest rank.

    python scripts/lab/evaluate.py [--reduced]        # reduced: under 20 minutes on two CPU cores

Batches of mixed requests, their tokens on R = 8 virtual source ranks, go through the model; at every MoE layer the
product's operators (or a baseline) decide what is dispatched. All methods get the same requests, so they are paired.
Writes docs/results/quality.json, which scripts/lab/plot.py turns into pictures and tables.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lab_calibration
import lab_checkpoint
import lab_material
import lab_methods
import numpy as np
import torch
from lab_judge import RANKS, as_batch, by_task, exact
from lab_methods import Inputs, Layout, Method, rank_rows
from lab_model import Embedded, LabModel, Routing
from lab_tasks import NO_LABEL, Group, Maker
from lab_tokens import Vocabulary
from torch import Tensor

from sglang_macs import profile

# Batches by turns from three mixes of requests. Experts are balanced over training; as in production, it is traffic
# that differs from it which fills some ranks more than others.
MIXES = {
    "training": {  # 84 requests, 7,700 tokens, 79 % visual
        "text": {"copy": 12, "lookup": 8, "add": 4},
        "tiny": {"map": 4},
        "wide": {"read": 14, "compare": 6},
        "square": {"read": 6, "count": 8, "compare": 6, "where": 2, "colour": 2},
        "large": {"read": 4, "count": 2, "scene": 4},
        "huge": {"read": 2},
    },
    "documents": {  # 72 requests, 4,600 tokens, 72 % visual: strings to read
        "text": {"copy": 20},
        "wide": {"read": 36, "compare": 12},
        "large": {"read": 4},
    },
    "pictures": {  # 72 requests, 7,600 tokens, 83 % visual: large pictures
        "text": {"copy": 24, "lookup": 4},
        "square": {"count": 12, "compare": 8, "read": 8},
        "large": {"scene": 6, "count": 4, "read": 4},
        "huge": {"read": 2},
    },
}
MASTERED = 0.9  # unclipped accuracy from which on a task counts: what is not learned cannot be lost
BOUNDS = (1.0, 1.05, 1.1, 1.2, 1.5)
STRESS = (0.5, 0.7)  # below the mean: where methods part
RESAMPLES = 2000
SWEPT_AT = 0.7
# Sweeps of the default preset and of the paper's, one option at a time.
SWEEPS = {
    "rank": {
        "delta": (0.0, 0.5, 1.0, 2.0, 4.0),
        "alpha": (0.0, 0.5, 1.0, 2.0, 4.0),
        "reroute_rounds": (1, 2, 4, 8),
        "buckets": (32, 64, 128, 256),
    },
    "paper": {"rho": (0.0, 0.25, 0.5, 1.0), "delta": (0.0, 1.0, 4.0)},
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
        self._count(given, outcome.ids)
        self.seconds.append(outcome.seconds)
        if self.with_error:
            self._measure_error(routing, ids, weights)
        return ids, weights

    def _count(self, given: Inputs, ids: Tensor) -> None:
        experts = given.num_experts
        mean = given.ids.numel() / RANKS
        self.before.append(float(rank_rows(given.ids, experts).max()) / mean)
        self.after.append(float(rank_rows(ids, experts).max()) / mean)
        for name, which in (("visual", given.visual), ("text", ~given.visual)):
            self.tally.counts[name] += int(which.sum()) * ids.shape[1]
            self.tally.counts[f"{name}_clipped"] += int((ids != given.ids)[which].sum())
            self.tally.counts[f"{name}_dropped"] += int((ids < 0)[which].sum())

    def _measure_error(self, routing: Routing, ids: Tensor, weights: Tensor) -> None:
        experts = self.model.model["language_model"].layers[routing.layer].mlp.experts
        whole = experts(routing.hidden, routing.ids, routing.weights, self.model.dense)[self.layout.tokens]
        clipped = experts(routing.hidden, ids, weights, self.model.dense)[self.layout.tokens]
        self.tally.error.append(float((clipped - whole).norm() / whole.norm()))

    def close(self) -> None:
        self.tally.before.append(sum(self.before) / len(self.before))
        self.tally.after.append(max(self.after))
        self.tally.seconds.append(sum(self.seconds) / len(self.seconds))


def inputs_of(routing: Routing, layout: Layout) -> Inputs:
    """The planned tokens' part of a routing."""
    parts = (routing.hidden, routing.logits, routing.ids, routing.weights)
    return Inputs(routing.layer, *(x[layout.tokens].contiguous() for x in parts), layout)


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
        source.append((place[planned], image.expand(n, -1)[planned], planned.sum(1)))
        start += n * width
    tokens, visual, lengths = (torch.cat(x) for x in zip(*source, strict=True))
    order = torch.randperm(len(lengths)).to(device)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(lengths), device=device) % RANKS
    rank_of = rank.repeat_interleave(lengths)
    request_of = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    by_rank = rank_of.argsort(stable=True)
    segment = torch.where(visual, request_of if entropy_scope == "image" else 0, -1).int()
    segments = len(lengths) if entropy_scope == "image" else 1
    return Layout(tokens[by_rank], torch.bincount(rank_of, minlength=RANKS).tolist(), segment[by_rank], segments)


@dataclass(frozen=True)
class Course:
    """What cases are made from, and how models run: the batches of every seed and mix, `batches` of each."""

    model: LabModel
    make: Maker
    dtype: torch.dtype
    seeds: Sequence[int]
    workers: int
    seconds: float  # begin no batch of a part after this long

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
    """Confidence intervals by resampling whole batches, paired with the unclipped model."""

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


@torch.no_grad()
def run_cases(course: Course, specs: list, plans: list[tuple[Method, float]], errors: int) -> Findings:
    """All of `plans`, and the unclipped model, on every case; the first `errors` cases with the layers' errors."""
    found, start = Findings(), time.perf_counter()
    everything = [(Method("unclipped", lab_methods.keep_all, acts_above_bound_only=False), None), *plans]
    for done, spec in enumerate(specs):
        case = course.case(*spec)
        found.seeds.append(case.seed)
        found.mixes.append(case.mix)
        found.right.append(_by_name(case.right))
        found.asked.append(_by_name({k: [True] * len(v) for k, v in case.right.items()}))
        for method, bound in everything:
            tally = found.tallies.setdefault((method.name, bound), Tally())
            judge(course.model, case, method, bound or 0.0, tally, course.dtype, done < errors)
        seconds = time.perf_counter() - start
        print(f"  {case.mix}, seed {case.seed}: {done + 1} of {len(specs)}, {seconds:.0f} s", flush=True)
        if seconds > course.seconds:
            break
    return found


def compare(course: Course, batches: int, plans: list[tuple[Method, float]], errors: int = 0) -> dict:
    """Rows for every (method, bound) of `plans`, and the unclipped model's."""
    specs = course.specs(batches)
    shares = [specs[i :: course.workers] for i in range(course.workers)]
    found = Findings()
    if course.workers == 1:
        found = run_cases(course, specs, plans, errors)
    else:  # fork: the children see the model and the plans as they are
        with ThreadPoolExecutor(course.workers) as pool:
            for part in pool.map(lambda share: _in_child(run_cases, course, share, plans, errors), shares):
                found.extend(part)
    statistics = Statistics(found.seeds, found.mixes, found.right, found.asked)
    rows = []
    for (name, bound), tally in found.tallies.items():
        reference = found.tallies.get(("rank", bound))
        rows.append(row_of(name, bound, tally, statistics, reference if name != "rank" else None))
    mastered = [t for t, m in zip(statistics.tasks, statistics.mastered, strict=True) if m]
    return {
        "batches": len(found.seeds),
        "requests": int(statistics.asked.sum()),
        "mastered": mastered,
        "rows": sorted(rows, key=lambda r: (r["bound"] or 0.0, -r["kept"][0])),
    }


def _in_child(function: Callable, *arguments):
    """What `function` returns, from a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function(*arguments)))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        child.join()


def sweep_plans(modality: dict, bound: float) -> list[tuple[Method, float]]:
    """One option of a preset at a time."""
    plans = [(Method("rank", lab_methods.WithPlan({}, modality)), bound)]
    for preset, options in SWEEPS.items():
        for option, values in options.items():
            for value in values:
                made = lab_methods.WithPlan({"preset": preset, option: value}, modality)
                plans.append((Method(f"{preset} {option}={value}", made), bound))
    return plans


def importance_plans(model: LabModel, norms: Tensor, modality: dict, bounds: Sequence[float]):
    """Other measures of what may be given up, each with re-routing and without."""
    measures = {
        "gate x mean norm": lab_methods.ByMeanNorm(norms),
        "gate x true norm": lab_methods.ByNorm(lab_calibration.true_norms(model)),
        "gate x redundancy": lab_methods.redundancy,
        "gate / entropy weight": lab_methods.inverse_entropy,
    }
    plans = []
    for bound in bounds:
        plans.append((Method("rank", lab_methods.WithPlan({}, modality)), bound))
        for name, measure in measures.items():
            for reroute in ("global", "none"):
                suffix = "" if reroute == "global" else " -reroute"
                made = lab_methods.WithPlan({"reroute": reroute}, modality, measure)
                plans.append((Method(f"{name}{suffix}", made), bound))
                made = lab_methods.WithPlan({"reroute": reroute, "protect_text": False}, modality, measure)
                plans.append((Method(f"{name} -protection{suffix}", made), bound))
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=lab_checkpoint.CHECKPOINT)
    parser.add_argument("--material", type=Path, help="of lab_material.py, where scikit-learn is missing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=lab_checkpoint.ROOT / "docs" / "results" / "quality.json")
    parser.add_argument("--reduced", action="store_true", help="fewer batches, bounds 1.0, 1.05 and 1.2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, help="per seed and mix (default 8; reduced 1)")
    parser.add_argument("--sweep-batches", type=int, help="the same for the other parts (4; 1)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no batch of a part after this long")
    parser.add_argument("--workers", type=int, help="processes (default: the CPU's cores; 1 on a GPU)")
    parser.add_argument("--bounds", type=float, nargs="*")
    parser.add_argument("--skip", nargs="*", default=[], choices=("main", "stress", "sweeps", "importance", "drift"))
    options = parser.parse_args()

    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # the cores are the workers'; and a forked child cannot use its parent's threads
    options.workers = options.workers or (1 if device.type == "cuda" else os.cpu_count())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = lab_checkpoint.load(options.checkpoint, device)
    model.dense = device.type == "cuda"
    words = Vocabulary(options.checkpoint / "tokenizer.json")
    make = Maker(words, lab_material.load("held_out", path=options.material), "held_out")
    other = Maker(words, lab_material.load("train", path=options.material, variants=2), "train")
    bounds = options.bounds or ((1.0, 1.05, 1.2) if options.reduced else BOUNDS)
    batches = options.batches or (1 if options.reduced else 8)
    sweep_batches = options.sweep_batches or (1 if options.reduced else 4)
    errors = 2 if options.reduced else 6
    start = time.perf_counter()
    with torch.no_grad():
        calibrated = profile.load(str(options.checkpoint / "profile.json"))  # recorded on the training digits
        modality = {layer: calibrated.of_layer(layer) for layer in range(model.arch.layers)}
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
        course = Course(model, make, dtype, range(options.seeds), options.workers, options.seconds)
        parts = {
            "main": (batches, [(m, b) for b in bounds for m in lab_methods.methods(modality)], errors),
            "stress": (sweep_batches, [(m, b) for b in STRESS for m in lab_methods.methods(modality)], errors),
            "sweeps": (sweep_batches, sweep_plans(modality, SWEPT_AT)),
        }
        if "importance" not in options.skip:
            norms = lab_calibration.record(model, other, MIXES["training"], batches=2, dtype=dtype).norms
            plans = importance_plans(model, norms, modality, options.bounds or (0.7, 1.0))
            parts["importance"] = (sweep_batches, plans, errors)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for name, (count, plans, *rest) in parts.items():
            if name in options.skip:
                continue
            print(f"{name}: {len(plans)} passes a batch", flush=True)
            result[name] = compare(course, count, plans, *rest)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        if "drift" not in options.skip:
            print("drift of the calibration", flush=True)
            result["drift"] = lab_calibration.drift(model, make, other, dtype)
    result["seconds"] = round(time.perf_counter() - start, 1)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.out} ({result['seconds']:.0f} s)")
    for row in result.get("main", {"rows": []})["rows"]:
        if row["bound"] in (None, 1.0, 1.05):
            kept, low, high = (100 * x for x in row["kept"])
            print(
                f"{row['bound'] or '':>5} {row['method']:<22} kept {kept:6.2f} % [{low:.2f}, {high:.2f}]  "
                f"KL {row['kl']:.4f}  clipped {100 * row['share']['clipped']:.1f} %  "
                f"worst {row['max_rank_rows_after']['worst']:.3f}"
            )


if __name__ == "__main__":
    main()

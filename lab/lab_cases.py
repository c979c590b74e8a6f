"""Batches of requests on virtual ranks, and what a method does to one."""

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lab import lab_methods
from lab.lab_architecture import Embedded, Routing, picture_spans, visual_columns
from lab.lab_judge import as_batch, by_task, exact
from lab.lab_methods import Inputs, Layout, Method, Outcome, fullest, rank_rows
from lab.lab_model import LabModel
from lab.lab_pictures import TOKEN
from lab.lab_statistics import Findings, Tally, so_far
from lab.lab_suites import Mix
from lab.lab_tasks import NO_LABEL, Group
from sglang_macs.plan.routing import Routing as Router

UNCLIPPED = Method("unclipped", lab_methods.keep_all, acts_above_bound_only=False)


@dataclass(frozen=True)
class Case:
    """One batch on the device, with the unclipped model's answers.

    groups; embedded; layout; answers: log-probabilities [A, V] at the answers' tokens; right answers by task and size;
    inputs: of every MoE layer, unclipped; peaks: by layer, rows of the fullest rank over the mean.
    """

    seed: int
    mix: str
    groups: list[Group]
    embedded: Embedded
    layout: Layout
    answers: Tensor
    right: dict[str, list[bool]]
    inputs: list[Inputs]
    peaks: list[float]
    top_k: int


class Judge:
    """The seam of one forward pass: lets `method` decide on the planned tokens and records what it did."""

    def __init__(self, model: LabModel, case: Case, method: Method, bound: float, tally: Tally, with_error: bool):
        self.model, self.layout, self.bound = model, case.layout, bound
        self.decide = method.decide if method.across is None else method.across(case.inputs, bound)
        self.tally, self.with_error = tally, with_error
        self.after, self.before, self.seconds = [], [], []

    def __call__(self, routing: Routing) -> tuple[Tensor, Tensor]:
        given = inputs_of(self.model, routing, self.layout)
        outcome = self.decide(given, self.bound)
        ids, weights = routing.ids.clone(), routing.weights.clone()
        ids[self.layout.tokens], weights[self.layout.tokens] = outcome.ids, outcome.weights
        self._count(given, outcome)
        self.seconds.append(outcome.seconds)
        if self.with_error:
            self._measure_error(routing, ids, weights)
        return ids, weights

    def _count(self, given: Inputs, outcome: Outcome) -> None:
        ids, mean = outcome.ids, given.ids.numel() / given.layout.ranks
        self.before.append(fullest(given, given.ids) / mean)
        self.after.append((fullest(given, ids) if outcome.rows is None else float(outcome.rows.max())) / mean)
        for name, which in (("visual", given.visual), ("text", ~given.visual)):
            self.tally.counts[name] += int(which.sum()) * ids.shape[1]
            self.tally.counts[f"{name}_clipped"] += int((ids != given.ids)[which].sum())
            self.tally.counts[f"{name}_dropped"] += int((ids < 0)[which].sum())

    def _measure_error(self, routing: Routing, ids: Tensor, weights: Tensor) -> None:
        experts = self.model.moe(routing.layer).experts
        whole = experts(routing.hidden, routing.ids, routing.weights, self.model.experts_by)[self.layout.tokens]
        clipped = experts(routing.hidden, ids, weights, self.model.experts_by)[self.layout.tokens]
        self.tally.error.append(float((clipped - whole).norm() / whole.norm()))

    def close(self) -> None:
        self.tally.before.append(sum(self.before) / len(self.before))
        self.tally.after.append(max(self.after))
        self.tally.seconds.append(sum(self.seconds) / len(self.seconds))


def inputs_of(model: LabModel, routing: Routing, layout: Layout) -> Inputs:
    """The planned tokens' part of a routing."""
    parts = (routing.hidden, routing.logits, routing.ids, routing.weights)
    received = None if routing.received is None else routing.received[layout.tokens]
    made = (x[layout.tokens].contiguous() for x in parts)
    return Inputs(routing.layer, *made, layout, received, router_of(model, routing.layer))


def router_of(model: LabModel, layer: int) -> Router:
    """As the product sees it."""
    arch, bias = model.arch, getattr(model.moe(layer).gate, "e_score_correction_bias", None)
    return Router(arch.scoring, bias, arch.groups, arch.topk_groups)


def lay_out(groups: Sequence[Group], ranks: int, entropy_scope: str = "batch") -> Layout:
    """Requests on ranks: shuffled, then dealt out by turns, as a balancing router would; prompts alone are planned."""
    device = groups[0].ids.device
    source, start = [], 0
    for g in groups:
        n, width = g.ids.shape
        column = torch.arange(width, device=device)
        image = visual_columns(g.size, width, device)
        planned = column < g.prompt[:, None]
        place = start + torch.arange(n * width, device=device).view(n, width)
        source.append((place[planned], image.expand(n, -1)[planned], planned.sum(1), _detail(g)[planned]))
        start += n * width
    tokens, visual, lengths, detail = (torch.cat(x) for x in zip(*source, strict=True))
    order = torch.randperm(len(lengths)).to(device)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(lengths), device=device) % ranks
    rank_of = rank.repeat_interleave(lengths)
    request_of = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    by_rank = rank_of.argsort(stable=True)
    segment = torch.where(visual, request_of if entropy_scope == "image" else 0, -1).int()
    segments = len(lengths) if entropy_scope == "image" else 1
    sizes = torch.bincount(rank_of, minlength=ranks).tolist()
    return Layout(tokens[by_rank], sizes, segment[by_rank], segments, detail[by_rank])


def _detail(group: Group) -> Tensor:
    """[n, L] f32: the pixels' standard deviation within a visual token, over 64 levels and at most 1; 1 for text."""
    n, width = group.ids.shape
    found = torch.ones(n, width, device=group.ids.device)
    if group.size is not None:
        squares = (
            group.pictures.float().unfold(2, TOKEN, TOKEN).unfold(3, TOKEN, TOKEN)
        )  # [., 3, rows, columns, 16, 16]
        spread = squares.flatten(4).std(-1).mean(1).flatten(1).view(n, group.size.pictures, -1)
        for picture, span in enumerate(picture_spans(group.size)):
            found[:, span] = (spread[:, picture] / 64).clamp(max=1.0)
    return found


@dataclass(frozen=True)
class Course:
    """What cases are made from, and how models run."""

    model: LabModel
    make: object  # what draws held-out batches: `batch(mix)`
    mixes: dict[str, Mix]
    dtype: torch.dtype
    seeds: Sequence[int]
    ends: float = math.inf  # by time.monotonic(): no case begins later

    def specs(self, batches: int) -> list[tuple[int, int, int]]:
        """(index, seed, number of the mix) of every case."""
        return [(i, seed, mix) for i in range(batches) for seed in self.seeds for mix in range(len(self.mixes))]

    def case(self, index: int, seed: int, number: int, ranks: int) -> Case:
        """Pictures are drawn on the CPU, so a seed means the same everywhere."""
        name = list(self.mixes)[number]
        torch.manual_seed(10_000 * seed + 10 * index + number)
        device = next(self.model.parameters()).device
        groups = [g.to(device) for g in self.make.batch(self.mixes[name])]
        embedded = self.model.embed([as_batch(g) for g in groups], self.dtype)
        logits, routings = self.model.decode(embedded, None, self.dtype)
        right = by_task(groups, [exact(x, g.labels) for x, g in zip(logits, groups, strict=True)])
        layout = lay_out(groups, ranks)
        inputs = [inputs_of(self.model, r, layout) for r in routings]
        rows = [rank_rows(x.ids, x.num_experts, ranks) for x in inputs]
        peaks = [float(r.max() * ranks / r.sum()) for r in rows]
        answers = answer_logits(logits, groups)
        return Case(seed, name, groups, embedded, layout, answers, right, inputs, peaks, self.model.arch.top_k)


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
    tally.kl.append(divergence(case, logits))


def divergence(case: Case, logits: list[Tensor]) -> float:
    """KL of the answers' tokens from the unclipped model's, nats, mean over tokens."""
    now = answer_logits(logits, case.groups)
    return float((case.answers.exp() * (case.answers - now)).sum(-1).mean())


def kept_of(case: Case, logits: list[Tensor]) -> float:
    """Right answers over the unclipped model's."""
    right = sum(int(exact(x, g.labels).sum()) for x, g in zip(logits, case.groups, strict=True))
    return right / max(1, sum(sum(rows) for rows in case.right.values()))


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


@dataclass(frozen=True)
class Part:
    """One table of the results: `plans` on `batches` cases of every seed and mix over `ranks` ranks, the first `errors`
    of a worker with the layers' output errors.
    """

    batches: int
    plans: list[tuple[Method, float]]
    errors: int = 0
    records_attention: bool = False
    ranks: int = 8


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
    """Every plan of the part, and the unclipped model, on every case; `keep` gets what is known after each.

    A part that fails is left out from then on; what it had found stays, and the other parts go on.
    """
    found, failed, start = {name: Findings() for name in parts}, set(), time.monotonic()
    for done, (name, spec) in enumerate(work):
        if time.monotonic() > course.ends:
            break
        if name in failed:
            continue
        part, with_error = parts[name], len(found[name].seeds) < parts[name].errors
        try:
            found[name].extend(run_case(course, course.case(*spec, part.ranks), part, with_error))
        except Exception:
            traceback.print_exc()
            print(f"  {name} {spec} failed: no more of this part", flush=True)
            failed.add(name)
            continue
        print(f"  {name} {spec}: {done + 1} of {len(work)}, {time.monotonic() - start:.0f} s", flush=True)
        if part.plans:
            print(f"    {so_far(found[name])}", flush=True)
        keep(found)
    if failed:
        keep(found)
        raise SystemExit(f"failed: {', '.join(sorted(failed))}")
    return found


def run_case(course: Course, case: Case, part: Part, with_error: bool) -> Findings:
    """One case under every plan of the part."""
    found = Findings()
    course.model.records_attention = part.records_attention
    for method, bound in [(UNCLIPPED, None), *part.plans]:
        tally = found.tallies.setdefault((method.name, bound), Tally())
        judge(course.model, case, method, bound or 0.0, tally, course.dtype, with_error)
    found.seeds.append(case.seed)
    found.mixes.append(case.mix)
    found.right.append(_by_name(case.right))
    found.asked.append(_by_name({k: [True] * len(v) for k, v in case.right.items()}))
    return found

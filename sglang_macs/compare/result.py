"""What the answers say: each measure with MACS on against off, beside off against off, and the verdict."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .answers import Kept
from .arms import Clipped
from .divergence import compare
from .requests import Request
from .statistics import Estimate, Finding, block_means, estimate, fewest_blocks, judge, thirds

MEASURES = ("divergence", "drop", "changed", "lost")
NAMES = {
    "divergence": "divergence (KL), nats per token",
    "drop": "log-probability lost by off's own tokens, nats per token",
    "changed": "answers that differ",
    "lost": "right answers lost",
}


@dataclass(frozen=True)
class Case:
    """One request: of each measure on against off and off against off; NaN where there is none. first: tokens that the
    answers have in common, on and off.
    """

    request: Request
    block: int
    prompt_tokens: int
    answer_tokens: int
    on: dict[str, float]
    floor: dict[str, float]
    first: int | None
    answers: dict[str, str]


@dataclass(frozen=True)
class Row:
    """One group of requests: by measure the estimates of on, floor, and what is beyond the floor."""

    group: str
    requests: int
    on: dict[str, Estimate]
    floor: dict[str, Estimate]
    beyond: dict[str, Estimate]


@dataclass(frozen=True)
class Result:
    """findings: by measure, those that decide. clipped: while MACS was on, None if no counters say it."""

    status: int
    line: str
    rows: list[Row]
    findings: dict[str, Finding]
    cases: list[Case]
    refused: int
    accuracy: dict[str, float]
    clipped: Clipped | None
    needed: int | None  # requests, with status 2

    def to_json(self) -> dict[str, Any]:
        """JSON values: NaN is null."""
        raw = {"status": self.status, "verdict": self.line, "requests": len(self.cases), "refused": self.refused}
        raw |= {"needed": self.needed, "accuracy": self.accuracy}
        raw["clipped"] = None if self.clipped is None else asdict(self.clipped)
        raw["findings"] = {name: asdict(finding) for name, finding in self.findings.items()}
        return _plain(raw | {"groups": [asdict(row) for row in self.rows]})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    kept: Kept,
    blocks: Sequence[Sequence[Request]],
    done: Sequence[int],
    allowed: dict[str, float],
    contains: bool,
    switched: bool,
) -> Result:
    """Of the blocks that are complete, `done`. allowed: by deciding measure, beyond the floor. contains: an answer is
    right if a reference stands in it, not only if it is one. switched: one server was, so something has to be clipped.
    """
    cases, refused = _cases(kept, blocks, done, contains)
    rows = [_row(name, chosen) for name, chosen in _groups(cases)]
    blocks_of_cases = np.array([case.block for case in cases])
    found: dict[str, np.ndarray] = {}
    for measure in allowed:
        values = np.array([_beyond(case, measure) for case in cases])
        if len(values) and not np.isnan(values).all():
            found[measure] = block_means(values, blocks_of_cases)
    findings = {measure: judge(means, allowed[measure], len(found)) for measure, means in found.items()}
    counted = _counted(kept, done)
    size = len(cases) / max(len(done), 1)
    status, needed = _status(findings, size)
    idle = switched and status == 0 and counted is not None and counted.clipped == 0
    status = 2 if idle else status
    line = _idle_line() if idle else _line(status, findings, needed, len(cases))
    names = ("off", "again", "on")
    right = {arm: _mean([case.answers[f"right {arm}"] for case in cases if case.request.references]) for arm in names}
    return Result(status, line, rows, findings, cases, refused, right, counted, needed if status == 2 else None)


def _cases(
    kept: Kept, blocks: Sequence[Sequence[Request]], done: Sequence[int], contains: bool
) -> tuple[list[Case], int]:
    cases, refused = [], 0
    for number in done:
        arms = {arm: kept.passes[number, arm].answers for arm in ("off", "again", "on")}
        for i, request in enumerate(blocks[number]):
            given = {arm: answers[i] for arm, answers in arms.items()}
            if any(answer.refused for answer in given.values()):
                refused += 1
                continue
            tokens = {arm: answer.tokens for arm, answer in given.items()}
            on = [compare(tokens["off"], tokens["on"]), compare(tokens["again"], tokens["on"])]
            floor = [compare(tokens["off"], tokens["again"]), compare(tokens["again"], tokens["off"])]
            right = {arm: _is_right(answer.text, request, contains) for arm, answer in given.items()}
            measures = [
                {
                    "divergence": _mean([pair.divergence for pair in pairs]),
                    "drop": _mean([pair.drop for pair in pairs]),
                    "changed": _mean([pair.first is not None for pair in pairs]),
                    "lost": lost,
                }
                for pairs, lost in (
                    (on, (right["off"] + right["again"]) / 2 - right["on"]),
                    (floor, right["off"] - right["again"]),
                )
            ]
            answers = {arm: answer.text for arm, answer in given.items()}
            answers |= {f"right {arm}": value for arm, value in right.items()}
            length = given["off"].prompt_tokens, len(tokens["off"])
            cases.append(Case(request, number, *length, *measures, on[0].first, answers))
    return cases, refused


def _is_right(text: str, request: Request, contains: bool) -> float:
    """1 or 0; NaN without references."""
    if not request.references:
        return math.nan
    answer = _normal(text)
    wanted = [_normal(reference) for reference in request.references]
    if contains:
        return float(any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", answer) for one in wanted))
    return float(answer in wanted)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _beyond(case: Case, measure: str) -> float:
    """What is lost of right answers has its floor at 0: off is as often right as off."""
    return case.on[measure] - (0.0 if measure == "lost" else case.floor[measure])


def _groups(cases: Sequence[Case]) -> list[tuple[str, list[Case]]]:
    found = [("all", list(cases))]
    found += [
        ("text", [c for c in cases if not c.request.pictures]),
        ("pictures", [c for c in cases if c.request.pictures]),
    ]
    for words, length in (("prompts", lambda c: c.prompt_tokens), ("answers", lambda c: c.answer_tokens)):
        ranges = thirds([length(case) for case in cases])
        for low, high in ranges if len(ranges) > 1 else ():
            found.append((f"{words} of {low} to {high} tokens", [c for c in cases if low <= length(c) <= high]))
    return [(name, chosen) for name, chosen in found if chosen]


def _row(group: str, cases: Sequence[Case]) -> Row:
    blocks = np.array([case.block for case in cases])

    def each(value) -> dict[str, Estimate]:
        return {m: estimate(np.array([value(case, m) for case in cases], dtype=float), blocks) for m in MEASURES}

    on, floor = each(lambda case, m: case.on[m]), each(lambda case, m: case.floor[m])
    return Row(group, len(cases), on, floor, each(_beyond))


def _counted(kept: Kept, done: Sequence[int]) -> Clipped | None:
    each = [kept.passes[number, "on"].clipped for number in done]
    if not each or any(one is None for one in each):
        return None
    return Clipped(sum(one.assignments for one in each), sum(one.clipped for one in each))


def _status(findings: dict[str, Finding], size: float) -> tuple[int, int | None]:
    """A loss on any measure is one; none is none on all. And the requests that would tell, blocks being of `size`."""
    every = [finding.status for finding in findings.values()]
    if 1 in every:
        return 1, None
    if every and not any(every):
        return 0, None
    open_ones = [finding.needed for finding in findings.values() if finding.status == 2]
    blocks = max(open_ones or [fewest_blocks()], key=lambda n: math.inf if n is None else n)
    return 2, None if blocks is None else math.ceil(blocks * max(size, 1))


def _idle_line() -> str:
    return (
        "cannot be said: nothing was clipped under this load, so this is not what clipping costs. Raise --concurrency, "
        "or lower --min-tokens (sglang-macs set) or gamma"
    )


def _line(status: int, findings: dict[str, Finding], needed: int | None, requests: int) -> str:
    # Of a loss, on what it is one.
    told = {name: finding for name, finding in findings.items() if status != 1 or finding.status == 1}
    each = "; ".join(_words(name, finding) for name, finding in told.items())
    if status == 1:
        return f"loss found beyond the noise floor: {each}"
    if status == 0:
        return f"no loss beyond the noise floor: {each}"
    more = f"about {needed} requests would tell, {requests} were asked"
    if needed is None:
        more = "it lies at what is allowed, where no number of requests tells"
    return f"cannot be said: {each or 'nothing to compare'}; {more}"


def _words(name: str, finding: Finding) -> str:
    what = {"divergence": "divergence", "lost": "right answers lost"}[name]
    return f"{what} {shown(name, finding.mean)}, {shown(name, finding.allowed)} allowed"


def shown(measure: str, value: float) -> str:
    """A value of a measure, as it is printed."""
    if math.isnan(value):
        return "?"
    return f"{value:.1e}" if measure in ("divergence", "drop") else f"{value:.1%}"

"""The result as text for a terminal, and as one page."""

import math
from collections.abc import Sequence

import numpy as np

from ..errors import printable
from ..observe.page import WIDTH, key, label, line, path, section, svg, text, tiles, whole
from .result import MEASURES, NAMES, Case, Result, Row, shown
from .statistics import Estimate

ON, FLOOR = "#0f766e", "#94a3b8"
MOST_CASES = 25  # that are shown word by word
MOST_WORDS = 300  # characters of a question or an answer
LOWEST = 1e-9  # of a logarithmic axis


def as_text(found: Result) -> str:
    """A table of all groups, what else there is to say, and the verdict as the last line."""
    lines = _aligned([_HEAD, *(_cells(row) for row in found.rows)]) if found.rows else []
    return "\n".join(printable(part, 1000) for part in (*lines, *_notes(found), found.line))


_HEAD = ("", "requests", "divergence on", "off", "differ on", "off", "right lost")


def _cells(row: Row) -> tuple[str, ...]:
    figures = [_interval("divergence", row.on["divergence"]), shown("divergence", row.floor["divergence"].mean)]
    figures += [_interval("changed", row.on["changed"]), shown("changed", row.floor["changed"].mean)]
    return (row.group, str(row.requests), *figures, _interval("lost", row.on["lost"]))


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]


def _interval(measure: str, one: Estimate) -> str:
    if math.isnan(one.low):
        return shown(measure, one.mean)
    return f"{shown(measure, one.mean)} [{shown(measure, one.low)}, {shown(measure, one.high)}]"


def _notes(found: Result) -> list[str]:
    notes = []
    if found.clipped is not None and found.clipped.assignments:
        share = found.clipped.clipped / found.clipped.assignments
        notes.append(f"clipped: {share:.1%} of the planned assignments while MACS was on")
    elif found.clipped is not None:
        notes.append("clipped: nothing was planned while MACS was on")
    if not math.isnan(found.accuracy["off"]):
        each = (
            f"{words} {found.accuracy[arm]:.1%}"
            for arm, words in (("off", "off"), ("again", "off again"), ("on", "on"))
        )
        notes.append(f"right answers: {', '.join(each)}")
    changed = [case for case in found.cases if case.first is not None]
    if changed:
        notes.append(f"where answers differ: first at token {np.median([c.first for c in changed]) + 1:g} (median)")
    if found.refused:
        notes.append(f"{found.refused} requests were refused by a server and left out")
    return notes


def page(found: Result, title: str) -> str:
    """Self-contained HTML. title: what was compared, in words."""
    sections = [
        _tiles(found),
        section("Divergence by group", _GROUPS_NOTE, _forest(found.rows)),
        section("Divergence over requests", _SPREAD_NOTE, _spread(found.cases)),
        section("Requests that changed most", _CASES_NOTE, _most_changed(found.cases)),
        section("Figures", _FIGURES_NOTE, _table(found.rows)),
    ]
    words = "; ".join([title, *_notes(found)])
    return whole(f"Clipping: {('no loss', 'a loss', 'cannot be said')[found.status]}", words, sections)


def _tiles(found: Result) -> str:
    boxes = []
    if found.rows:
        row = found.rows[0]
        for measure, words in (
            ("divergence", "nats per token, on against off; {} off against off"),
            ("changed", "of greedy answers differ; {} off against off"),
            ("lost", "of right answers lost; {} off against off"),
        ):
            if not math.isnan(row.on[measure].mean):
                boxes.append(
                    (shown(measure, row.on[measure].mean), words.format(shown(measure, row.floor[measure].mean)))
                )
        boxes.append((f"{row.requests:,}", "requests, three times each"))
    return f"<section><h2>{text(found.line)}</h2></section>{tiles(boxes)}"


_GROUPS_NOTE = (
    "KL divergence of the tokens' distributions, nats per token, with 95 % intervals: MACS on against off, and off "
    "against off, the noise floor, which batches alone make. Logarithmic."
)


def _forest(rows: Sequence[Row]) -> str:
    values = [side["divergence"] for row in rows for side in (row.on, row.floor)]
    known = [v for one in values for v in (one.mean, one.low, one.high) if not math.isnan(v) and v > LOWEST]
    if not known:
        return ""
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)) + 1e-9)
    left, right, height = 260, WIDTH - 30, 34

    def x_of(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / max(high - low, 1)
        return left + share * (right - left)

    bottom = 20 + height * len(rows)
    parts = []
    for power in range(low, high + 1):
        x = x_of(10.0**power)
        parts += [line(x, 14, x, bottom, "#e2e8f0"), label(x, bottom + 16, f"1e{power}", "middle")]
    for i, row in enumerate(rows):
        y = 20 + height * (i + 0.5)
        parts.append(label(left - 12, y + 4, f"{row.group} ({row.requests})", "end"))
        for one, colour, shift in ((row.on["divergence"], ON, -5), (row.floor["divergence"], FLOOR, 5)):
            if not math.isnan(one.low):
                parts.append(line(x_of(one.low), y + shift, x_of(one.high), y + shift, colour, 2))
            parts.append(f"<circle cx='{x_of(one.mean):.1f}' cy='{y + shift:.1f}' r='4.5' fill='{colour}'/>")
    return key((ON, "on against off"), (FLOOR, "off against off")) + svg(bottom + 24, parts, "divergence by group")


_SPREAD_NOTE = (
    "Each request's mean over its tokens, in order of size: how many requests carry what is lost. Logarithmic."
)


def _spread(cases: Sequence[Case]) -> str:
    sides = [np.sort([side["divergence"] for side in of]) for of in ([c.on for c in cases], [c.floor for c in cases])]
    most = max([float(side[-1]) for side in sides if len(side)] or [0.0])
    if len(cases) < 2 or most <= LOWEST:
        return ""
    high, left, right, top, bottom = math.ceil(math.log10(most) + 1e-9), 64, WIDTH - 16, 12, 240
    low = math.log10(LOWEST)
    parts = []
    for power in range(int(low), high + 1, 2):
        y = bottom - (power - low) / (high - low) * (bottom - top)
        parts += [line(left, y, right, y, "#e2e8f0"), label(left - 8, y + 4, f"1e{power}", "end")]
    for values, colour in zip(sides, (ON, FLOOR), strict=True):
        ys = bottom - (np.log10(np.maximum(values, LOWEST)) - low) / (high - low) * (bottom - top)
        xs = np.linspace(left, right, len(values))
        points = path(list(zip(xs.tolist(), ys.tolist(), strict=True)))
        parts.append(f"<path d='{points}' fill='none' stroke='{colour}' stroke-width='2'/>")
    parts += [label(left, bottom + 18, "least"), label(right, bottom + 18, "most changed request", "end")]
    return key((ON, "on against off"), (FLOOR, "off against off")) + svg(bottom + 26, parts, "divergence over requests")


_CASES_NOTE = "By divergence, those whose answers differ first. Line: of the file of requests."


def _most_changed(cases: Sequence[Case]) -> str:
    chosen = sorted(cases, key=lambda c: (c.first is None, -c.on["divergence"]))[:MOST_CASES]
    head = "".join(f"<th>{name}</th>" for name in ("line", "divergence", "question", "off", "on", "reference"))
    lines = []
    for case in chosen:
        words = (case.request.question, case.answers["off"], case.answers["on"], ", ".join(case.request.references))
        shorter = (word if len(word) <= MOST_WORDS else f"{word[:MOST_WORDS]} ..." for word in words)
        cells = [str(case.request.line), shown("divergence", case.on["divergence"]), *shorter]
        lines.append("".join(f"<td>{text(cell)}</td>" for cell in cells))
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{cells}</tr>' for cells in lines)}</table>"


_FIGURES_NOTE = "Means over requests with 95 % intervals, from resampling whole blocks of requests."


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("group", "requests", "on against off", "off against off", "beyond"))
    tables = []
    for measure in MEASURES:
        lines = []
        for row in rows:
            sides = (_interval(measure, side[measure]) for side in (row.on, row.floor, row.beyond))
            cells = (row.group, f"{row.requests:,}", *sides)
            lines.append(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>")
        tables.append(f"<p>{text(NAMES[measure])}</p><table><tr>{head}</tr>{''.join(lines)}</table>")
    return "".join(tables)

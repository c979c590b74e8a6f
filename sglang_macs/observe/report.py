"""A recorded trace as one self-contained HTML page: inline SVG and PNG, no scripts, nothing loaded from elsewhere.
Drawn by hand: it needs numpy alone.
"""

import base64
import struct
import zlib

import numpy as np

from ..choices import MODALITIES
from .page import WIDTH, key, label, line, path, section, svg, text, tiles, whole
from .trace import CLIPPED, KEPT, REROUTED, Picture, Trace

MAX_POINTS = 240  # of a chart over time; longer traces are averaged
MAX_PICTURES = 12
MAX_LAYER_VIEWS = 6
PANEL = 300  # pixels of a picture's longer side
BEFORE, AFTER, SHARE = "#94a3b8", "#0f766e", "#b45309"
DROPPED, REROUTED_COLOUR = (220, 38, 38), (245, 158, 11)


def page(trace: Trace, row_us: float | None = None) -> str:
    """The page. row_us: microseconds that one row costs its rank, to give the time saved; None leaves it in rows."""
    sections = [
        _tiles(trace, row_us),
        section("Load of each rank, layer by layer", _BY_LAYER_NOTE, _by_layer(trace)),
        section("The slowest rank, pass by pass", _OVER_TIME_NOTE, _over_time(trace)),
        _pictures(trace),
        section("Figures", "", _table(trace)),
    ]
    return whole("What MACS did", _subtitle(trace), sections)


def _subtitle(trace: Trace) -> str:
    config = trace.config
    what = f"preset {config.get('preset')}, scope {config.get('scope')}, gamma {config.get('gamma')}"
    size = f"{trace.ranks} ranks, {len(trace.layers)} MoE layers, {trace.experts} experts, top-{trace.top_k}"
    seconds = trace.steps[-1].time - trace.steps[0].time
    full = " The recording stopped at its size limit." if trace.full else ""
    of = f"replica {trace.replicas[0]}" if trace.replicas != [0] else ""
    if len(trace.replicas) > 1:
        of = f"replicas {', '.join(map(str, trace.replicas))} together, {trace.ranks} ranks each"
    passes = f"{len(trace.steps)} passes in {seconds:.1f} s{f' of {of}' if of else ''}"
    left = np.concatenate([~step.planned for step in trace.steps])
    alone = f" {left.mean():.0%} of the dispatches were left alone: expected to gain too little." if left.any() else ""
    return f"{what}; {size}; run {trace.run}: {passes}.{alone}{full}"


# ---- Key figures ---------------------------------------------------------------------------------------------------


def _imbalance(rows: np.ndarray) -> np.ndarray:
    """[..., R] -> [...], maximum over mean; 1 where there are none."""
    mean = rows.mean(axis=-1)
    return np.where(mean > 0, rows.max(axis=-1) / np.maximum(mean, 1e-9), 1.0)


def _outcomes(trace: Trace) -> np.ndarray:
    """[L, 3, 2] kept, clipped, re-routed by (visual | text), over all passes."""
    return sum(step.outcomes for step in trace.steps)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _tiles(trace: Trace, row_us: float | None) -> str:
    before, after = trace.rank_rows()
    slow_before, slow_after = before.max(axis=-1).sum(), after.max(axis=-1).sum()
    saved = slow_before - slow_after
    outcomes = _outcomes(trace).sum(axis=0)
    planned, lost = outcomes[KEPT] + outcomes[CLIPPED], outcomes[CLIPPED] - outcomes[REROUTED]
    boxes = [
        (
            f"{_imbalance(before).mean():.2f} → {_imbalance(after).mean():.2f}",
            "most loaded rank over mean, per dispatch",
        ),
        (_share(saved, slow_before), f"of the slowest rank's rows saved ({saved:,} of {slow_before:,})"),
    ]
    if row_us is not None:
        boxes.append((f"{saved * row_us / 1e3:,.1f} ms", f"straggler time saved, at {row_us:g} µs a row"))
    for i, modality in enumerate(MODALITIES):
        clipped, dropped = _share(outcomes[CLIPPED, i], planned[i]), _share(lost[i], planned[i])
        boxes.append((clipped, f"of {modality} assignments clipped, {dropped} dropped"))
    boxes.append((f"{np.mean([step.visual_share for step in trace.steps]):.2f}", "mean visual share R_v"))
    return tiles(boxes)


# ---- Load by layer -------------------------------------------------------------------------------------------------


_BY_LAYER_NOTE = (
    "Left: rows of each rank over the mean, as routed and as dispatched. Right: the most loaded rank over the mean, "
    "averaged over the dispatches; the distance between the marks is what all other ranks no longer wait for."
)


def _by_layer(trace: Trace) -> str:
    before, after = trace.rank_rows()
    worst = [_imbalance(rows).mean(axis=0) for rows in (before, after)]  # [L]
    mean = np.maximum(before.sum(axis=0).mean(axis=-1, keepdims=True), 1e-9)
    relative = [rows.sum(axis=0) / mean for rows in (before, after)]  # [L, R]
    layers = len(trace.layers)
    height = 26 if layers <= 16 else 17
    block = 270
    left = (64, 64 + block + 24)
    axis = (left[1] + block + 48, WIDTH - 30)
    low, high = 1.0, max(1.05, float(max(worst[0].max(), worst[1].max())) * 1.02)

    def x_of(value: float) -> float:
        return axis[0] + (value - low) / (high - low) * (axis[1] - axis[0])

    parts = [label(left[i], 14, name) for i, name in enumerate(("routed", "dispatched"))]
    bottom = 26 + layers * height
    for tick in np.linspace(low, high, 4):
        parts.append(line(x_of(tick), 24, x_of(tick), bottom, "#e2e8f0"))
        parts.append(label(x_of(tick), 14, f"{tick:.2f}", "middle"))
    for i, layer in enumerate(trace.layers):
        y = 26 + i * height
        parts.append(label(56, y + height / 2 + 4, f"layer {layer}", "end"))
        for side in (0, 1):
            parts += _cells(relative[side][i], left[side], y, block, height)
        a, b, middle = x_of(worst[0][i]), x_of(worst[1][i]), y + height / 2
        parts.append(line(b, middle, a, middle, "#cbd5e1", 3))
        parts += [f"<circle cx='{x:.1f}' cy='{middle:.1f}' r='4.5' fill='{c}'/>" for x, c in ((a, BEFORE), (b, AFTER))]
    return key((BEFORE, "as routed"), (AFTER, "as dispatched")) + svg(bottom + 8, parts, "load by layer")


def _cells(values: np.ndarray, x: float, y: float, block: float, height: float) -> list[str]:
    """One rank a cell: red above the mean, blue below, the figure inside where it fits."""
    width = block / len(values)
    gap = min(1.0, width / 16)  # on either side; many ranks are narrow
    parts = []
    for rank, value in enumerate(values):
        strength = min(abs(value - 1) / 0.5, 1)
        end = (220, 80, 60) if value > 1 else (70, 130, 200)
        colour = tuple(round(241 + (c - 241) * strength * 0.85) for c in end)
        title = f"<title>rank {rank}: {value:.3f} of the mean</title>"
        box = f"x='{x + rank * width + gap:.2f}' y='{y + 1}' width='{width - 2 * gap:.2f}' height='{height - 2}'"
        box += f" rx='{3 * gap:.1f}'"
        parts.append(f"<rect {box} fill='rgb{colour}'>{title}</rect>")
        if width >= 32:
            parts.append(label(x + (rank + 0.5) * width, y + height / 2 + 4, f"{value:.2f}", "middle", "#0f172a"))
    return parts


# ---- Over time -----------------------------------------------------------------------------------------------------

_OVER_TIME_NOTE = (
    "Rows of the most loaded rank, summed over the layers, of every planned pass: the shaded part is waiting saved. "
    "Below, the batch's visual share R_v."
)


def _over_time(trace: Trace) -> str:
    before, after = (_thinned(rows.max(axis=-1).sum(axis=-1)) for rows in trace.rank_rows())
    share = _thinned(np.array([step.visual_share.mean() for step in trace.steps]))
    top, middle, bottom, left, right = 12, 200, 300, 64, WIDTH - 16
    most = max(float(before.max()), 1.0)
    xs = np.linspace(left, right, len(before) + 1)

    def stairs(values: np.ndarray, y0: float, height: float) -> list[tuple[float, float]]:
        ys = y0 - values * height
        return [point for i, y in enumerate(ys) for point in ((xs[i], y), (xs[i + 1], y))]

    parts = []
    for y, words in ((middle, "0"), (top, f"{most:,.0f}"), (bottom, "0"), (middle + 30, "1")):
        parts += [line(left, y, right, y, "#e2e8f0"), label(left - 8, y + 4, words, "end")]
    upper, lower = stairs(before / most, middle, middle - top), stairs(after / most, middle, middle - top)
    parts.append(f"<path d='{path(upper + lower[::-1])}Z' fill='{AFTER}' fill-opacity='.14'/>")
    for points, colour in ((upper, BEFORE), (lower, AFTER)):
        parts.append(f"<path d='{path(points)}' fill='none' stroke='{colour}' stroke-width='2'/>")
    area = stairs(share, bottom, bottom - middle - 30)
    parts.append(f"<path d='{path([(left, bottom), *area, (right, bottom)])}Z' fill='{SHARE}' fill-opacity='.18'/>")
    parts.append(f"<path d='{path(area)}' fill='none' stroke='{SHARE}' stroke-width='2'/>")
    parts += [label(left, bottom + 18, "first pass"), label(right, bottom + 18, "last pass", "end")]
    legend = key((BEFORE, "slowest rank, as routed"), (AFTER, "as dispatched"), (SHARE, "visual share R_v"))
    return legend + svg(bottom + 26, parts, "the slowest rank over time")


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most MAX_POINTS values: means of as many neighbours each."""
    size = -(-len(values) // MAX_POINTS)
    starts = np.arange(0, len(values), size)
    return np.add.reduceat(values.astype(float), starts) / np.diff([*starts, len(values)])


# ---- Pictures ------------------------------------------------------------------------------------------------------

_IMPORTANCES = {  # of a token's weakest assignment: what is shown, and its short name
    "gate": ("the router's gate of each token's weakest assignment", "gate"),
    "entropy": ("the entropy weight of each token", "entropy weight"),
    "entropy_gate": ("entropy weight times gate of each token's weakest assignment", "weight x gate"),
}
_OUTCOME_NOTE = (
    "Right: the share of a token's assignments that were clipped, red where they were dropped and amber where another "
    "expert took them. Below, single layers."
)


def _importance(trace: Trace) -> tuple[str, str]:
    """What the middle panel shows, long and short."""
    named = str(trace.config.get("importance"))
    words, short = _IMPORTANCES["gate"]
    return _IMPORTANCES.get(named, (f"{words} (the plan went by {named})", short))  # recorder.importance_of


def _pictures_note(trace: Trace) -> str:
    note = f"Middle: {_importance(trace)[0]}, averaged over the layers; dark tokens are worth little and go first"
    pressed = trace.config.get("scope") == "rank" and trace.config.get("alpha") != 0
    return f"{note}{' (an overloaded expert counts for less than shown)' if pressed else ''}. {_OUTCOME_NOTE}"


def _pictures(trace: Trace) -> str:
    title = "What was clipped, and where in the picture"
    if not trace.pictures:
        return section(title, "No picture was recorded: none came, or this model's processor makes no plain grid.", "")
    chosen = sorted(trace.pictures, key=lambda p: -int(p.clipped.sum()))[:MAX_PICTURES]
    note = f"{_pictures_note(trace)} {len(chosen)} of {len(trace.pictures)} recorded pictures."
    return section(title, note, "".join(_card(trace, picture) for picture in chosen))


def _card(trace: Trace, picture: Picture) -> str:
    layers, rows, columns = picture.importance.shape
    width, height = (PANEL * side / max(rows, columns) for side in (columns, rows))
    known = picture.known
    seen = int(known.sum()) * layers * trace.top_k
    importance = np.where(known, picture.importance.mean(axis=0), np.nan)
    lost, given = int(picture.dropped[:, known].sum()), int(picture.clipped[:, known].sum())
    told = f"clipped {_share(given, seen)}, dropped {_share(lost, seen)}"
    span = f"{_importance(trace)[1]} {np.nanmin(importance):.3f} to {np.nanmax(importance):.3f}"
    panels = [
        _view(picture, width, height, None, f"{columns} by {rows} tokens{_recorded(trace, picture)}"),
        _view(picture, width, height, _importance_png(importance), span),
        _view(picture, width, height, _outcome_png(picture, slice(None), trace.top_k), told),
    ]
    small = []
    for i in np.unique(np.linspace(0, layers - 1, min(layers, MAX_LAYER_VIEWS)).round().astype(int)):
        overlay = _outcome_png(picture, slice(i, i + 1), trace.top_k)
        small.append(_view(picture, width * 0.4, height * 0.4, overlay, f"layer {trace.layers[i]}"))
    rows_of_views = (
        f"<div class='panels{kind}'>{''.join(views)}</div>" for kind, views in (("", panels), (" small", small))
    )
    photo = ""
    if picture.jpeg is not None:  # once for all views
        photo = f" style='--photo:url(data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()})'"
    return f"<div class='card'{photo}>{''.join(rows_of_views)}</div>"


def _recorded(trace: Trace, picture: Picture) -> str:
    """How much of it, and where, as far as that is not plain."""
    parts = []
    if (share := picture.known.mean()) < 1:
        parts.append(f"{share:.0%} of them recorded")
    if picture.copies > 1:
        replica = f"replica {picture.replica}, " if len(trace.replicas) > 1 else ""
        parts.append(f"as {replica}rank {picture.rank} saw it, one of {picture.copies}")
    return "".join(f"; {part}" for part in parts)


def _view(picture: Picture, width: float, height: float, overlay: bytes | None, caption: str) -> str:
    images = ""
    if picture.jpeg is not None:
        images += f"<div class='photo{' dim' if overlay else ''}'></div>"
    if overlay is not None:
        images += f"<img class='grid' alt='' src='data:image/png;base64,{base64.b64encode(overlay).decode()}'>"
    box = f"<div class='view' style='width:{width:.0f}px;height:{height:.0f}px'>{images}</div>"
    return f"<figure>{box}<figcaption>{text(caption)}</figcaption></figure>"


def _importance_png(importance: np.ndarray) -> bytes:
    """Dark where a token is worth little, clear where it is worth much, scaled to this picture; NaN shows nothing."""
    low, high = np.nanmin(importance), np.nanmax(importance)
    level = np.nan_to_num((importance - low) / max(high - low, 1e-6), nan=1.0)[..., None]
    colour = np.array([49, 18, 110]) * (1 - level) + np.array([253, 231, 120]) * level
    alpha = np.where(np.isnan(importance), 0, 175)[..., None]
    return _png(np.concatenate([colour, alpha], axis=-1).round().astype(np.uint8))


def _outcome_png(picture: Picture, layers: slice, top_k: int) -> bytes:
    given, lost = (outcome[layers].mean(axis=0) / top_k for outcome in (picture.clipped, picture.dropped))
    red = np.where(given > 0, lost / np.maximum(given, 1e-9), 0)[..., None]
    colour = np.array(DROPPED) * red + np.array(REROUTED_COLOUR) * (1 - red)
    alpha = np.where(given > 0, 30 + 210 * given, 0)[..., None]
    return _png(np.concatenate([colour, alpha], axis=-1).round().clip(0, 255).astype(np.uint8))


def _png(pixels: np.ndarray) -> bytes:
    """[height, width, 4] u8 as a PNG file. Not by Pillow: a trace is read on machines that have numpy alone."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), dtype=np.uint8), pixels.reshape(height, -1)], axis=1)  # filter 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")


# ---- Figures -------------------------------------------------------------------------------------------------------


def _table(trace: Trace) -> str:
    before, after = trace.rank_rows()
    outcomes = _outcomes(trace)
    decided = np.stack([step.planned for step in trace.steps]).mean(axis=0)
    gain = np.stack([step.gain for step in trace.steps]).mean(axis=0)
    names = ("layer", "rows", "planned", "expected gain", "max / mean routed", "dispatched")
    names += ("clipped visual", "text", "dropped visual", "text")
    lines = []
    for i, layer in enumerate(trace.layers):
        planned, lost = outcomes[i, KEPT] + outcomes[i, CLIPPED], outcomes[i, CLIPPED] - outcomes[i, REROUTED]
        worst = [f"{_imbalance(rows[:, i]).mean():.3f}" for rows in (before, after)]
        shares = [_share(part[m], planned[m]) for part in (outcomes[i, CLIPPED], lost) for m in (0, 1)]
        decisions = [f"{decided[i]:.0%}", f"{gain[i]:,.0f}"]
        lines.append([str(layer), f"{before[:, i].sum():,}", *decisions, *worst, *shares])
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f"<details><summary>by layer</summary><table><tr>{head}</tr>{rows}</table></details>"

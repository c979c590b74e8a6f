"""Pages that need nothing else: inline SVG, no scripts, nothing loaded. What all of them share: frame, sections, tiles,
and the pieces of a chart.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from string import Template

from .. import __version__

WIDTH = 960  # of charts, in pixels
TEMPLATE = Path(__file__).with_name("page.html")


def whole(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The page. Title and subtitle are escaped; sections are HTML."""
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        title=text(title), subtitle=text(subtitle), sections="\n".join(sections), version=__version__
    )


def text(value: object) -> str:
    """Escaped, for content and attributes."""
    return html.escape(str(value), quote=True)


def section(title: str, note: str, content: str) -> str:
    """A card. content is HTML."""
    return f"<section><h2>{text(title)}</h2>{f'<p>{text(note)}</p>' if note else ''}{content}</section>"


def tiles(boxes: Sequence[tuple[str, str]]) -> str:
    """Figures and what they mean, side by side."""
    each = (f"<div class='tile'><b>{text(figure)}</b><span>{text(meaning)}</span></div>" for figure, meaning in boxes)
    return f"<div class='tiles'>{''.join(each)}</div>"


def svg(height: float, parts: Sequence[str], name: str) -> str:
    """A chart of WIDTH by `height` pixels."""
    size = f"viewBox='0 0 {WIDTH} {height:.0f}' width='{WIDTH}' height='{height:.0f}'"
    return f"<svg {size} role='img' aria-label='{text(name)}'>{''.join(parts)}</svg>"


def label(x: float, y: float, words: str, anchor: str = "start", fill: str = "#64748b") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{fill}'>{text(words)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    ends = f"x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'"
    return f"<line {ends} stroke='{colour}' stroke-width='{width}'/>"


def path(points: Sequence[tuple[float, float]]) -> str:
    """What a path's attribute d takes."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def key(*entries: tuple[str, str]) -> str:
    """Colours and what they stand for."""
    spans = (f"<span><i style='background:{colour}'></i>{text(words)}</span>" for colour, words in entries)
    return f"<div class='key'>{''.join(spans)}</div>"

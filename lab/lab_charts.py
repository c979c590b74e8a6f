"""Charts and tables: values read off an axis, a legend, a row and a column."""

from collections.abc import Callable, Sequence

import numpy as np

from lab.lab_canvas import COLOURS, FONTS, GREY, INK, PAPERS, Canvas, Colour
from lab.lab_sample import SIZES, TURNS, Dice, Sample

TOPS = (10, 20, 50, 100)  # of a value axis; values are tenths of it, gridlines fifths
AXIS, HEAD, FOOT = 30.0, 14.0, 24.0  # pixels left of, above and below the plotted area
Paint = Callable[[], list[np.ndarray]]


def _axis(canvas: Canvas, top: int, font: str) -> Callable[[float], float]:
    """Draws a value axis with its gridlines; returns the height in pixels of a value."""
    bottom, right = canvas.height - FOOT, canvas.width - 6

    def height(value: float) -> float:
        return bottom - (bottom - HEAD) * value / top

    for i in range(6):
        y = height(top * i / 5)
        canvas.line([(AXIS, y), (right, y)], GREY)
        canvas.text(AXIS - 4, y, str(top * i // 5), font, 11, "right")
    canvas.line([(AXIS, HEAD), (AXIS, bottom), (right, bottom)], INK)
    return height


def bars(
    canvas: Canvas, labels: Sequence[str], values: Sequence[int], top: int, fills: list[Colour], font: str
) -> None:
    """A bar chart that fills the canvas."""
    height = _axis(canvas, top, font)
    step = (canvas.width - AXIS - 8) / len(labels)
    for i, (label, value, fill) in enumerate(zip(labels, values, fills, strict=True)):
        x = AXIS + 4 + i * step
        canvas.box(x + 0.18 * step, height(value), 0.64 * step, height(0) - height(value), fill)
        canvas.text(x + step / 2, canvas.height - 12, label, font, 11, "center")


def _bar_chart(dice: Dice, name: str, labels: list[str], values: list[int], top: int) -> Paint:
    font, paper, size = dice.choice(FONTS[:3]), dice.choice(PAPERS), SIZES[name]
    fills = [COLOURS[c] for c in dice.choices(list(COLOURS), k=len(labels))]

    def paint() -> list[np.ndarray]:
        canvas = Canvas(size.width, size.height, paper)
        bars(canvas, labels, values, top, fills, font)
        return [canvas.picture()]

    return paint


def _count_of_bars(dice: Dice, name: str) -> int:
    return dice.randint(3, 5 if name == "sheet" else 7)


def bar_value(dice: Dice, name: str) -> Sample:
    """How high is the bar of a label?"""
    top, count = dice.choice(TOPS), _count_of_bars(dice, name)
    labels, values = dice.words(count), [dice.randint(1, 10) * top // 10 for _ in range(count)]
    turns = tuple((f"What is the value of {labels[i]}?", str(values[i])) for i in dice.order(count))
    return Sample((*labels, *values, top), turns[:TURNS], _bar_chart(dice, name, labels, values, top))


def bar_extreme(dice: Dice, name: str) -> Sample:
    """Which bar is the highest, which the lowest?"""
    count = _count_of_bars(dice, name)
    labels, values = dice.words(count), [10 * v for v in dice.sample(range(1, 11), count)]
    by_value = [label for _, label in sorted(zip(values, labels, strict=True))]
    turns = [("Which bar is the highest?", by_value[-1]), ("Which bar is the lowest?", by_value[0])]
    dice.shuffle(turns)
    return Sample((*labels, *values), tuple(turns), _bar_chart(dice, name, labels, values, 100))


def line_value(dice: Dice, name: str) -> Sample:
    """How high is the line of a colour at a place?"""
    top, points, size = dice.choice(TOPS), dice.randint(4, 6), SIZES[name]
    places = sorted(dice.sample(range(10, 100), points))
    colours = dice.sample(list(COLOURS), dice.randint(1, 2))
    values = {c: [dice.randint(0, 10) * top // 10 for _ in places] for c in colours}
    font, paper = dice.choice(FONTS[:3]), dice.choice(PAPERS)

    def paint() -> list[np.ndarray]:
        canvas = Canvas(size.width, size.height, paper)
        height, step = _axis(canvas, top, font), (canvas.width - AXIS - 40) / (points - 1)
        xs = [AXIS + 16 + i * step for i in range(points)]
        for x, place in zip(xs, places, strict=True):
            canvas.text(x, canvas.height - 12, str(place), font, 11, "center")
        for colour, row in values.items():
            spots = [(x, height(v)) for x, v in zip(xs, row, strict=True)]
            canvas.line(spots, COLOURS[colour], 2.0)
            for x, y in spots:
                canvas.circle(x, y, 3.5, COLOURS[colour])
        return [canvas.picture()]

    asked = [(c, i) for c in colours for i in range(points)]
    dice.shuffle(asked)
    turns = tuple((f"What is {c} at {places[i]}?", str(values[c][i])) for c, i in asked[:TURNS])
    return Sample((*places, top, repr(values)), turns, paint)


def pie_extreme(dice: Dice, name: str) -> Sample:
    """Which part of a pie is the largest, which the smallest? Labels stand in a legend."""
    count, size = dice.randint(3, 5), SIZES[name]
    labels, colours = dice.words(count), dice.sample(list(COLOURS), count)
    shares = dice.sample([1.0, 1.5, 2.2, 3.2, 4.5], count)
    start, font, paper = dice.randint(0, 359), dice.choice(FONTS[:3]), dice.choice(PAPERS)

    def paint() -> list[np.ndarray]:
        canvas, angle = Canvas(size.width, size.height, paper), float(start)
        radius = 0.42 * size.height
        for i, (label, colour, share) in enumerate(zip(labels, colours, shares, strict=True)):
            stop = angle + 360 * share / sum(shares)
            canvas.wedge(radius + 10, size.height / 2, radius, angle, stop, COLOURS[colour])
            y, angle = 24 + 26 * i, stop
            canvas.box(2 * radius + 26, y - 5, 11, 11, COLOURS[colour])
            canvas.text(2 * radius + 42, y, label, font, 12)
        return [canvas.picture()]

    by_share = [label for _, label in sorted(zip(shares, labels, strict=True))]
    turns = [("Which part is the largest?", by_share[-1]), ("Which part is the smallest?", by_share[0])]
    turns += [(f"What colour is {x}?", c) for x, c in zip(labels, colours, strict=True)]
    dice.shuffle(turns)
    return Sample((*labels, *colours, *shares), tuple(turns[:TURNS]), paint)


def _table(dice: Dice, name: str, rows: list[str], columns: list[str], cells: list[list[int]]) -> Paint:
    size, font, paper, ruled = SIZES[name], dice.choice(FONTS), dice.choice(PAPERS), dice.random() < 0.6

    def paint() -> list[np.ndarray]:
        canvas = Canvas(size.width, size.height, paper)
        wide, tall = size.width / (len(columns) + 1), size.height / (len(rows) + 1)
        for i, row in enumerate([["", *columns], *([r, *map(str, c)] for r, c in zip(rows, cells, strict=True))]):
            for j, cell in enumerate(row):
                canvas.text((j + 0.5) * wide, (i + 0.5) * tall, cell, font, 13, "center")
            if i and (ruled or i == 1):
                canvas.line([(2, i * tall), (size.width - 2, i * tall)], INK if i == 1 else GREY)
        for j in range(1, len(columns) + 1 if ruled else 2):
            canvas.line([(j * wide, 2), (j * wide, size.height - 2)], GREY)
        return [canvas.picture()]

    return paint


def _drawn_table(dice: Dice, name: str, distinct: bool) -> tuple[list[str], list[str], list[list[int]], Paint]:
    """Words for rows and columns, and numbers of one to three digits, different within a column if `distinct`."""
    tall, wide = (
        (dice.randint(3, 5), dice.randint(2, 3)) if name == "sheet" else (dice.randint(5, 8), dice.randint(3, 4))
    )
    words = dice.words(tall + wide)
    below = dice.choice((20, 100, 1000))
    columns = [dice.sample(range(below), tall) if distinct else dice.choices(range(below), k=tall) for _ in range(wide)]
    cells = [list(row) for row in zip(*columns, strict=True)]
    return words[:tall], words[tall:], cells, _table(dice, name, words[:tall], words[tall:], cells)


def table_cell(dice: Dice, name: str) -> Sample:
    """What stands in a row and a column?"""
    rows, columns, cells, paint = _drawn_table(dice, name, distinct=False)
    asked = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    dice.shuffle(asked)
    turns = tuple((f"What is {columns[j]} of {rows[i]}?", str(cells[i][j])) for i, j in asked[:TURNS])
    return Sample((*rows, *columns, repr(cells)), turns, paint)


def table_extreme(dice: Dice, name: str) -> Sample:
    """Which row has the largest number of a column?"""
    rows, columns, cells, paint = _drawn_table(dice, name, distinct=True)
    turns = []
    for j in dice.order(len(columns)):
        largest = max(range(len(rows)), key=lambda i, j=j: cells[i][j])
        turns.append((f"Which row has the largest {columns[j]}?", rows[largest]))
    return Sample((*rows, *columns, repr(cells)), tuple(turns), paint)

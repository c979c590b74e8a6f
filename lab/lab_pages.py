"""Written pages, forms, things to count, and several pictures to compare."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from lab.lab_canvas import COLOURS, FONTS, GREY, PAPERS, Canvas, text_width
from lab.lab_charts import bars
from lab.lab_sample import SIZES, TURNS, Dice, Sample

FIELDS = ("Name", "City", "Street", "Code", "Date", "Total", "Phone", "Room", "Item", "Number")
NUMBERS = ("Code", "Date", "Total", "Phone", "Room", "Number")  # fields that hold digits
SHAPES = ("circles", "squares", "triangles")
ORDINALS = ("first", "second", "third")
MARGIN = 8


def read_word(dice: Dice, name: str) -> Sample:
    """One word or number, large: the first lesson of all reading."""
    said, size = dice.word() if dice.random() < 0.6 else dice.number(dice.randint(2, 5)), SIZES[name]
    font, pixels, paper = dice.choice(FONTS), dice.randint(12, 20), dice.choice(PAPERS)
    x = dice.uniform(2, max(3, size.width - 2 - text_width(said, font, pixels)))
    y = dice.uniform(12, size.height - 12)

    def paint() -> list[np.ndarray]:
        canvas = Canvas(size.width, size.height, paper)
        canvas.text(x, y, said, font, pixels)
        return [canvas.picture()]

    return Sample((said,), (("Read the word.", said),), paint)


def _page(dice: Dice, name: str) -> tuple[list[list[str]], Callable[[], list[np.ndarray]]]:
    """Lines of words, all different, and how they are drawn."""
    size, font, paper = SIZES[name], dice.choice(FONTS), dice.choice(PAPERS)
    pixels = dice.randint(12, 14)
    spacing = pixels + dice.randint(4, 10)
    most = int((size.height - 2 * MARGIN) / spacing)
    words = iter(dice.words(7 * most))
    lines, limit = [], size.width - 2 * MARGIN
    for _ in range(dice.randint(max(2, most // 2), most)):
        line = [next(words)]
        while len(line) < 6 and text_width(" ".join([*line, "mmmmmm"]), font, pixels) < limit:
            line.append(next(words))
        lines.append(line)

    def paint() -> list[np.ndarray]:
        canvas = Canvas(size.width, size.height, paper)
        for i, line in enumerate(lines):
            canvas.text(MARGIN, MARGIN + (i + 0.5) * spacing, " ".join(line), font, pixels)
        return [canvas.picture()]

    return lines, paint


def read_line(dice: Dice, name: str) -> Sample:
    """Two words of a line of a page, from its beginning or its end."""
    lines, paint = _page(dice, name)
    turns = []
    for i in dice.order(len(lines))[:TURNS]:
        if dice.random() < 0.5:
            turns.append((f"How does line {i + 1} begin?", " ".join(lines[i][:2])))
        else:
            turns.append((f"How does line {i + 1} end?", " ".join(lines[i][-2:])))
    return Sample((repr(lines),), tuple(turns), paint)


def next_word(dice: Dice, name: str) -> Sample:
    """Which word of a page comes after another in its line?"""
    lines, paint = _page(dice, name)
    pairs = [pair for line in lines for pair in pairwise(line)]
    dice.shuffle(pairs)
    return Sample((repr(lines),), tuple((f"What comes after {a}?", b) for a, b in pairs[:TURNS]), paint)


def form_field(dice: Dice, name: str) -> Sample:
    """What is written in a field of a form?"""
    size, font, hand = SIZES[name], dice.choice(FONTS[:2]), dice.choice(FONTS[2:])
    columns = 2
    rows = dice.randint(2, 4) if name == "sheet" else dice.randint(4, 5)
    names = dice.sample(FIELDS, min(rows * columns, len(FIELDS)))
    filled = {n: dice.number(dice.randint(2, 5)) if n in NUMBERS else dice.word() for n in names}
    paper = dice.choice(PAPERS)

    def paint() -> list[np.ndarray]:
        canvas = Canvas(size.width, size.height, paper)
        wide, tall = size.width / columns, size.height / rows
        for i, (title, value) in enumerate(filled.items()):
            x, y = (i % columns) * wide + 6, (i // columns) * tall
            canvas.text(x, y + 0.2 * tall, f"{title}:", font, 11)
            canvas.box(x, y + 0.34 * tall, wide - 14, 0.56 * tall, PAPERS[0], GREY)
            canvas.text(x + 6, y + 0.62 * tall, value, hand, 14, colour=COLOURS["blue"])
        return [canvas.picture()]

    turns = tuple((f"What is the {n}?", filled[n]) for n in dice.sample(names, min(TURNS, len(names))))
    return Sample((repr(filled),), turns, paint)


def _shape(canvas: Canvas, kind: str, x: float, y: float, radius: float, colour: str) -> None:
    if kind == "circles":
        canvas.circle(x, y, radius, COLOURS[colour])
    elif kind == "squares":
        canvas.box(x - radius, y - radius, 2 * radius, 2 * radius, COLOURS[colour])
    else:
        canvas.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], COLOURS[colour])


Scatter = list[tuple[str, str, int, float, float, float]]  # kind, colour, cell, shift right and down, radius


def _scatter(dice: Dice, cells: int, low: int, high: int) -> Scatter:
    """Shapes in cells of their own; two kinds and two colours, so that counts are seldom 0."""
    kinds, colours = dice.sample(SHAPES, 2), dice.sample(list(COLOURS), 2)
    places = dice.sample(range(cells), dice.randint(low, high))
    return [
        (dice.choice(kinds), dice.choice(colours), p, dice.uniform(-3, 3), dice.uniform(-3, 3), dice.uniform(4, 6.5))
        for p in places
    ]


def _draw_scatter(size, paper, shapes: Scatter) -> np.ndarray:
    canvas = Canvas(size.width, size.height, paper)
    side = 21 if size.height > 64 else 20
    columns = size.width // side
    for kind, colour, cell, dx, dy, radius in shapes:
        x, y = (cell % columns + 0.5) * side + dx, (cell // columns + 0.5) * side + dy
        _shape(canvas, kind, x, y, radius, colour)
    return canvas.picture()


def _counts(shapes: Scatter) -> dict[str, int]:
    """Of everything that can be asked for."""
    kinds, colours = [s[0] for s in shapes], [s[1] for s in shapes]
    return (
        {"shapes": len(shapes)}
        | {x: kinds.count(x) for x in kinds}
        | {f"{c} shapes": colours.count(c) for c in colours}
    )


def count(dice: Dice, name: str) -> Sample:
    """How many shapes are there, of a kind, of a colour?"""
    shapes, size, paper = _scatter(dice, 18, 1, 9), SIZES[name], dice.choice(PAPERS)
    turns = [(f"How many {what}?", str(n)) for what, n in _counts(shapes).items()]
    dice.shuffle(turns)
    content = tuple(sorted(s[:3] for s in shapes))
    return Sample(content, tuple(turns[:TURNS]), lambda: [_draw_scatter(size, paper, shapes)])


def more(dice: Dice, name: str) -> Sample:
    """Which picture has more shapes?"""
    size, paper = SIZES[name], dice.choice(PAPERS)
    while True:
        pictures = [_scatter(dice, 20, 1, 9) for _ in range(size.pictures)]
        lengths = [len(p) for p in pictures]
        if lengths.count(max(lengths)) == 1:
            break
    turns = [("Which picture has the most shapes?", ORDINALS[lengths.index(max(lengths))])]
    turns += [(f"How many shapes are in the {ORDINALS[i]} picture?", str(n)) for i, n in enumerate(lengths)]
    dice.shuffle(turns)
    content = tuple(tuple(sorted(s[:3] for s in p)) for p in pictures)
    return Sample(content, tuple(turns), lambda: [_draw_scatter(size, paper, p) for p in pictures])


def which_shows(dice: Dice, name: str) -> Sample:
    """Which picture has a word on it?"""
    size, words = SIZES[name], dice.words(3 * SIZES[name].pictures)
    font, pixels, paper = dice.choice(FONTS), dice.randint(13, 16), dice.choice(PAPERS)
    of_picture = [words[3 * i : 3 * i + 3] for i in range(size.pictures)]

    def paint() -> list[np.ndarray]:
        drawn = []
        for said in of_picture:
            canvas = Canvas(size.width, size.height, paper)
            for i, word in enumerate(said):
                canvas.text(MARGIN + 18 * i, 18 + 28 * i, word, font, pixels)
            drawn.append(canvas.picture())
        return drawn

    turns = [(f"Which picture shows {w}?", ORDINALS[i]) for i, said in enumerate(of_picture) for w in said]
    dice.shuffle(turns)
    return Sample(tuple(words), tuple(turns[:TURNS]), paint)


def compare_bars(dice: Dice, name: str) -> Sample:
    """Which of several charts has the higher bar of a label?"""
    size, labels, paper = SIZES[name], dice.words(3, longest=4), dice.choice(PAPERS)
    fill, font = COLOURS[dice.choice(list(COLOURS))], FONTS[0]
    rows = [dice.sample(range(1, 11), size.pictures) for _ in labels]  # by label, different over pictures
    values = [[10 * row[i] for row in rows] for i in range(size.pictures)]

    def paint() -> list[np.ndarray]:
        drawn = []
        for heights in values:
            canvas = Canvas(size.width, size.height, paper)
            bars(canvas, labels, heights, 100, [fill] * 3, font)
            drawn.append(canvas.picture())
        return drawn

    turns = [
        (f"Which picture has the highest {label}?", ORDINALS[row.index(max(row))])
        for label, row in zip(labels, rows, strict=True)
    ]
    dice.shuffle(turns)
    return Sample((*labels, repr(values)), tuple(turns), paint)


# -- without a picture ---------------------------------------------------------------------------------------------


def copy(dice: Dice, name: str) -> Sample:
    said = " ".join(dice.word() if dice.random() < 0.5 else dice.number(dice.randint(2, 4)) for _ in range(3))
    return Sample((said,), ((f"Copy {said}.", said),))


def lookup(dice: Dice, name: str) -> Sample:
    """A number in a list of words and numbers."""
    words = dice.words(dice.randint(3, 7))
    numbers = {w: dice.number(2) for w in words}
    listed = ", ".join(f"{w} {n}" for w, n in numbers.items())
    asked = dice.sample(words, min(TURNS, len(words)))
    turns = [(f"What is {w}?", numbers[w]) for w in asked]
    return Sample((listed,), ((f"Given {listed}. {turns[0][0]}", turns[0][1]), *turns[1:]))


def chain(dice: Dice, name: str) -> Sample:
    """A value through one or two equalities."""
    names = dice.words(dice.randint(4, 6))
    value = {names[0]: dice.number(2), names[1]: dice.number(2)}
    told = [f"{w} is {v}" for w, v in value.items()]
    for new in names[2:]:
        old = dice.choice(list(value))
        value[new] = value[old]
        told.append(f"{new} is {old}")
    asked = dice.sample(names, min(TURNS, len(names)))
    first, *later = [(f"What is {w}?", value[w]) for w in asked]
    listed = ", ".join(told)
    return Sample((listed,), ((f"Given {listed}. {first[0]}", first[1]), *later))


def maximum(dice: Dice, name: str) -> Sample:
    """The largest and the smallest of some numbers."""
    numbers = dice.sample(range(10, 100), dice.randint(3, 6))
    listed = ", ".join(map(str, numbers))
    turns = [("Which is the largest?", str(max(numbers))), ("Which is the smallest?", str(min(numbers)))]
    dice.shuffle(turns)
    first, *later = turns
    return Sample((listed,), ((f"Given {listed}. {first[0]}", first[1]), *later))

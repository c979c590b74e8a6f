"""The lab's questions, in batches of fixed shape: pictures, token rows and answers, made on any device.

A `Group` is all samples of a batch with pictures of one size. Its rows are

    <|im_start|>user\\n [<|vision_start|> image <|vision_end|>] question <|im_end|>\\n
    <|im_start|>assistant\\n answer <|im_end|>

and padding. Shapes depend on the batch's recipe alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lab.lab_material import Material
from lab.lab_pictures import BACKGROUNDS, COLOURS, Scene, Size, draw_background, join, paint
from lab.lab_tokens import END, HOLE, IMAGE, LETTERS, PAD, VISION_END, VISION_START, Vocabulary, close_up, join_columns

NO_LABEL = -100
SIZES = {
    "text": None,
    "tiny": Size(64, 64),  # 16 visual tokens
    "wide": Size(64, 192),  # 48
    "square": Size(128, 128),  # 64
    "large": Size(256, 256),  # 256
    "huge": Size(320, 384),  # 480: 0.97 of its request
}
# Samples of each task by picture size: what a model is judged on, one question a picture.
JUDGED = {
    "text": {"add": 16, "copy": 8, "lookup": 16},
    "tiny": {"map": 16},
    "wide": {"read": 16, "compare": 8, "colour": 8, "where": 8},
    "square": {"read": 8, "count": 8, "count_colour": 8, "colour": 8, "where": 8, "compare": 8},
    "large": {"read": 6, "count": 2, "count_colour": 3, "colour": 4, "where": 4, "scene": 4},
    "huge": {"read": 2, "count": 1, "colour": 2, "where": 1},
}
# What it is trained on: also talks, several questions about one picture or table, for the binding of question to place
# is learned from answers that differ by the question alone; and "recall" and "describe", where what is asked for stands
# right before its answer: the first step towards a lookup.
TRAIN_MIX = {
    "text": {"add_talk": 12, "copy": 8, "recall": 20, "lookup_talk": 20},
    "tiny": {"map": 24, "talk": 8},
    "wide": {"read": 26, "compare": 10, "describe": 12, "talk": 24},
    "square": {"read": 8, "compare": 8, "describe": 12, "talk": 28},
    "large": {"read": 8, "describe": 2, "talk": 8},
    "huge": {"read": 3, "talk": 2},
}
OCR_TASKS = ("read",)
READ_LENGTHS = {"wide": (2, 6), "square": (2, 4), "large": (4, 8), "huge": (6, 10)}
COPY_LENGTHS = (4, 12)
LOOKUP_PAIRS = (2, 10)
TALK_TURNS = 6  # of a talk without a picture
CORNERS = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Group:
    """Samples with pictures of one size, which has a name (`size` None: no pictures).

    ids [n, L] i64; labels [n, L] i64: the token to predict there, or `NO_LABEL`; prompt [n] i64: tokens of the prompt;
    length [n] i64: tokens without padding; pictures [n * pictures, 3, height, width] or None; tasks: (name, samples) in
    order.
    """

    name: str
    size: Size | None
    ids: Tensor
    labels: Tensor
    prompt: Tensor
    length: Tensor
    pictures: Tensor | None
    tasks: tuple[tuple[str, int], ...]

    def to(self, device: torch.device | str) -> "Group":
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return Group(**moved)


@dataclass(frozen=True)
class Asked:
    """What a task makes, as rows with holes, [n, .] i64: question and answer; the scene, if it has a picture; for a
    talk the questions and answers that follow, each in a turn of its own.
    """

    question: Tensor
    answer: Tensor
    scene: Scene | None = None
    later: tuple[tuple[Tensor, Tensor], ...] = ()


class Maker:
    """Draws batches from torch's default generator of the device.

    part: "train" or "held_out"; sums of the held-out part are never asked in training.
    """

    def __init__(self, words: Vocabulary, material: Material, part: str):
        self.words, self.material, self.part = words, material, part
        self.device = words.device
        sums = torch.arange(10_000, device=self.device)  # 100 a + b
        held_out = (sums // 100 * 7 + sums * 3) % 10 == 0  # one in ten
        self.sums = sums[held_out if part == "held_out" else ~held_out]

    def batch(self, mix: dict[str, dict[str, int]]) -> list[Group]:
        """One group per picture size of `mix` (as `TRAIN_MIX`), in its order."""
        return [self.group(size, tasks) for size, tasks in mix.items() if tasks]

    def group(self, name: str, tasks: dict[str, int]) -> Group:
        size = SIZES[name]
        asked = [TASKS[task](self, n, name) for task, n in tasks.items()]
        rows, labels, prompts, lengths = zip(*(self._rows(a, size) for a in asked), strict=True)
        width = max(r.shape[1] for r in rows)
        pictures = None if size is None else paint(join([a.scene for a in asked]), size, self.material)
        return Group(
            name,
            size,
            torch.cat([_widen(r, width, PAD) for r in rows]),
            torch.cat([_widen(x, width, NO_LABEL) for x in labels]),
            torch.cat(prompts),
            torch.cat(lengths),
            pictures,
            tuple(tasks.items()),
        )

    def _rows(self, asked: Asked, size: Size | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, words = asked.question.shape[0], self.words
        image = [] if size is None else [self.full(n, VISION_START), self.full(n, IMAGE, size.tokens)]
        image += [] if size is None else [self.full(n, VISION_END)]
        prompt = join_columns([words.opening, *image, asked.question, words.closing], n)
        ids, labels = [prompt], [torch.full_like(prompt, NO_LABEL)]
        for question, answer in ((None, asked.answer), *asked.later):
            if question is not None:
                turn = join_columns([words.again, question, words.closing], n)
                ids.append(_without(turn, answer))
                labels.append(torch.full_like(ids[-1], NO_LABEL))
            ids.append(_without(join_columns([answer, self.full(n, END)], n), answer))
            labels.append(ids[-1].masked_fill(ids[-1] == HOLE, NO_LABEL))
        ids, labels = torch.cat(ids, 1), torch.cat(labels, 1)
        closed, order = close_up(ids, ids.shape[1])
        labels = labels.gather(1, order)
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], NO_LABEL)], 1)  # predict the next token
        return closed, labels, (prompt != HOLE).sum(1), (ids != HOLE).sum(1)

    # -- pieces of tasks -------------------------------------------------------------------------------------------

    def full(self, n: int, value: int, width: int = 1) -> Tensor:
        return torch.full((n, width), value, dtype=torch.long, device=self.device)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        """Inclusive of both ends."""
        return torch.randint(low, high + 1, shape, device=self.device)

    def choose(self, n: int, among: int, count: int) -> Tensor:
        """[n, count] different numbers below `among`."""
        return torch.rand(n, among, device=self.device).argsort(1)[:, :count]

    def ask(self, n: int, *parts: str | Tensor) -> Tensor:
        """Phrases and columns [n, w] as rows."""
        return join_columns([self.words.row(p) if isinstance(p, str) else p for p in parts], n)

    def digit_tokens(self, digits: Tensor, length: Tensor | None = None) -> Tensor:
        """Tokens of digits [n, w], holes from `length` [n] on."""
        tokens = self.words.digits[digits]
        if length is None:
            return tokens
        return tokens.masked_fill(torch.arange(digits.shape[1], device=self.device) >= length[:, None], HOLE)

    def scatter(self, n: int, size: Size, count: Tensor, slots: int, distinct: bool = False) -> Scene:
        """`count` [n] of `slots` digits, each somewhere in a cell of its own."""
        rows, columns = size.cells
        cell = self.choose(n, rows * columns, slots)
        digit = self.choose(n, 10, slots) if distinct else self.randint(0, 9, n, slots)
        on = torch.arange(slots, device=self.device) < count[:, None]
        colour = self.randint(0, len(COLOURS) - 1, n, slots)
        return _padded(Scene(digit, colour, cell // columns, cell % columns, on, draw_background(n, self.device)))


def _without(turn: Tensor, answer: Tensor) -> Tensor:
    """The turn, all holes in rows without an answer: what a row has fewer turns by."""
    return turn.masked_fill((answer == HOLE).all(1, keepdim=True), HOLE)


MAX_SLOTS = 10  # digits of a picture


def _padded(scene: Scene) -> Scene:
    """The scene with `MAX_SLOTS` slots, so that scenes of different tasks join; the new ones are off."""
    more = MAX_SLOTS - scene.digit.shape[1]
    fields = {name: getattr(scene, name) for name in Scene.__dataclass_fields__}
    return Scene(**{k: v if k == "background" or not more else _widen(v, MAX_SLOTS, 0) for k, v in fields.items()})


def _widen(x: Tensor, width: int, value: int) -> Tensor:
    filler = torch.full((x.shape[0], width - x.shape[1]), value, dtype=x.dtype, device=x.device)
    return torch.cat([x, filler], 1)


def _read(make: Maker, n: int, name: str) -> Asked:
    """A row of digits, from left to right."""
    low, high = READ_LENGTHS[name]
    rows, columns = SIZES[name].cells
    length = make.randint(low, high, n)
    digit = make.randint(0, 9, n, high)
    start = (torch.rand(n, device=make.device) * (columns - length + 1)).long()
    step = torch.arange(high, device=make.device)
    column = (start[:, None] + step).clamp(max=columns - 1)
    row = make.randint(0, rows - 1, n, 1).expand(-1, high)
    colour = make.randint(0, len(COLOURS) - 1, n, 1).expand(-1, high)
    scene = _padded(Scene(digit, colour, row, column, step < length[:, None], draw_background(n, make.device)))
    return Asked(make.ask(n, "Read the digits."), make.digit_tokens(digit, length), scene)


def _count(make: Maker, n: int, name: str) -> Asked:
    count = make.randint(1, 9, n)
    scene = make.scatter(n, SIZES[name], count, 9)
    return Asked(make.ask(n, "How many digits?"), make.digit_tokens(count[:, None]), scene)


def _with_colour(make: Maker, scene: Scene, colour: Tensor) -> Scene:
    """Two digits in five take the colour [n, 1] that is asked for: else most answers would be 0 or 1."""
    takes = torch.rand(scene.colour.shape, device=make.device) < 0.4
    return replace(scene, colour=torch.where(takes, colour, scene.colour))


def _count_colour_turn(make: Maker, n: int, scene: Scene, asked: Tensor) -> tuple[Tensor, Tensor]:
    count = ((scene.colour == asked) & scene.on).sum(1, keepdim=True)
    colour = make.words.table([f" {c}?" for c in COLOURS])[asked[:, 0]]
    return make.ask(n, "How many digits are", colour), make.digit_tokens(count)


def _colour_turn(make: Maker, n: int, scene: Scene, slot: Tensor) -> tuple[Tensor, Tensor]:
    question = make.ask(n, "What colour is ", make.digit_tokens(scene.digit.gather(1, slot)), "?")
    return question, make.words.table(list(COLOURS))[scene.colour.gather(1, slot)[:, 0]]


def _where_turn(make: Maker, n: int, scene: Scene, slot: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    rows, columns = size.cells
    row, column = scene.row.gather(1, slot)[:, 0], scene.column.gather(1, slot)[:, 0]
    corner = 2 * (row >= rows // 2) + (column >= columns // 2)
    question = make.ask(n, "Where is ", make.digit_tokens(scene.digit.gather(1, slot)), "?")
    return question, make.words.table(CORNERS)[corner]


def _background_turn(make: Maker, n: int, scene: Scene) -> tuple[Tensor, Tensor]:
    return make.ask(n, "What is behind the digits?"), make.words.table(BACKGROUNDS)[scene.background]


def _count_colour(make: Maker, n: int, name: str) -> Asked:
    asked = make.randint(0, len(COLOURS) - 1, n, 1)
    scene = _with_colour(make, make.scatter(n, SIZES[name], make.randint(2, 7, n), 7), asked)
    return Asked(*_count_colour_turn(make, n, scene, asked), scene)


def _colour(make: Maker, n: int, name: str) -> Asked:
    scene = make.scatter(n, SIZES[name], make.randint(1, 6, n), 6, distinct=True)
    return Asked(*_colour_turn(make, n, scene, make.full(n, 0)), scene)


def _where(make: Maker, n: int, name: str) -> Asked:
    scene = make.scatter(n, SIZES[name], make.randint(1, 6, n), 6, distinct=True)
    return Asked(*_where_turn(make, n, scene, make.full(n, 0), SIZES[name]), scene)


def _compare(make: Maker, n: int, name: str) -> Asked:
    """Two digits, one in each half of the picture."""
    rows, columns = SIZES[name].cells
    digit = make.choose(n, 10, 2)
    half = torch.arange(2, device=make.device) * (columns // 2)
    column = make.randint(0, columns // 2 - 1, n, 2) + half
    scene = Scene(
        digit,
        make.randint(0, len(COLOURS) - 1, n, 2),
        make.randint(0, rows - 1, n, 2),
        column,
        torch.ones_like(digit, dtype=torch.bool),
        draw_background(n, make.device),
    )
    right = (digit[:, 1] > digit[:, 0]).long()
    return Asked(make.ask(n, "Which digit is larger?"), make.words.table(("left", "right"))[right], _padded(scene))


def _scene(make: Maker, n: int, name: str) -> Asked:
    scene = make.scatter(n, SIZES[name], make.randint(1, 9, n), 9)
    scene = replace(scene, background=make.randint(0, len(BACKGROUNDS) - 1, n))
    return Asked(*_background_turn(make, n, scene), scene)


def _pairs(make: Maker, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A table of different letters and different digits: its tokens, letters, digits, and the place asked for."""
    low, high = LOOKUP_PAIRS
    count = make.randint(low, high, n)
    letter, digit = make.choose(n, len(LETTERS), high), make.choose(n, 10, high)
    tokens = torch.stack([make.words.letters[letter], make.digit_tokens(digit)], 2).flatten(1)  # letter, digit, ...
    tokens = tokens.masked_fill(torch.arange(2 * high, device=make.device) >= 2 * count[:, None], HOLE)
    asked = (torch.rand(n, device=make.device) * count).long()[:, None]
    return tokens, letter, digit, asked, count


def _lookup(make: Maker, n: int, name: str) -> Asked:
    tokens, letter, digit, asked, _ = _pairs(make, n)
    name_of = make.words.letters[letter.gather(1, asked)]
    question = make.ask(n, "Given", tokens, ". What is", name_of, "?")
    return Asked(question, make.digit_tokens(digit.gather(1, asked)))


def _lookup_talk(make: Maker, n: int, name: str) -> Asked:
    """A table, and turns that ask for digits of letters and letters of digits."""
    tokens, letter, digit, _, count = _pairs(make, n)
    turns = []
    for turn, (place, missing) in enumerate(_different(make, count, LOOKUP_PAIRS[1], TALK_TURNS)):
        its_letter, its_digit = letter.gather(1, place), make.digit_tokens(digit.gather(1, place))
        if turn % 2:
            question = make.ask(n, " Which letter has ", its_digit, "?")
            answer = make.words.answer_letters[its_letter]
        else:
            question, answer = make.ask(n, " What is", make.words.letters[its_letter], "?"), its_digit
        turns.append((question, answer.masked_fill(missing, HOLE)))
    (first, answer), *later = _shuffled(make, turns)
    return Asked(make.ask(n, "Given", tokens, ".", first), answer, later=tuple(later))


def _recall(make: Maker, n: int, name: str) -> Asked:
    """Pairs of a table again, in the order asked for: each digit follows its letter at once."""
    tokens, letter, digit, _, count = _pairs(make, n)
    letters, digits = [], []
    for place, missing in _different(make, count, LOOKUP_PAIRS[1], TALK_TURNS):
        letters.append(make.words.letters[letter.gather(1, place)].masked_fill(missing, HOLE))
        digits.append(make.digit_tokens(digit.gather(1, place)).masked_fill(missing, HOLE))
    pairs = torch.cat([x for pair in zip(letters, digits, strict=True) for x in pair], 1)
    return Asked(make.ask(n, "Given", tokens, ". List", torch.cat(letters, 1), "."), pairs)


def _describe(make: Maker, n: int, name: str) -> Asked:
    """Digits and colours in reading order: each colour follows its digit at once."""
    slots = min(6, SIZES[name].cells[0] * SIZES[name].cells[1])
    scene = make.scatter(n, SIZES[name], make.randint(1, slots, n), slots, distinct=True)
    place = (scene.row * SIZES[name].cells[1] + scene.column).masked_fill(~scene.on, 10_000)
    order = place.argsort(dim=1, stable=True)[:, :slots]
    off = ~scene.on.gather(1, order)
    digits = make.digit_tokens(scene.digit.gather(1, order))[..., None]
    colours = make.words.table(list(COLOURS))[scene.colour.gather(1, order)]  # [n, slots, tokens of a colour]
    answer = torch.cat([digits, colours], 2).masked_fill(off[..., None], HOLE).flatten(1)
    return Asked(make.ask(n, "Describe the digits."), answer, scene)


def _talk(make: Maker, n: int, name: str) -> Asked:
    """One picture of scattered digits and a turn or two of every question about such."""
    slots = min(6, SIZES[name].cells[0] * SIZES[name].cells[1])  # a tiny picture has four cells
    count = make.randint(1, slots, n)
    scene = make.scatter(n, SIZES[name], count, slots, distinct=True)
    favourite = make.randint(0, len(COLOURS) - 1, n, 1)
    scene = _with_colour(make, scene, favourite)
    turns = [
        (make.ask(n, "How many digits?"), make.digit_tokens(count[:, None])),
        _background_turn(make, n, scene),
        _count_colour_turn(make, n, scene, favourite),
        _count_colour_turn(make, n, scene, make.randint(0, len(COLOURS) - 1, n, 1)),
    ]
    for slot, missing in _different(make, count, slots, 3):
        for question, answer in (
            _colour_turn(make, n, scene, slot),
            _where_turn(make, n, scene, slot, SIZES[name]),
        ):
            turns.append((question, answer.masked_fill(missing, HOLE)))
    (first, answer), *later = _shuffled(make, turns)
    return Asked(first, answer, scene, tuple(later))


def _different(make: Maker, count: Tensor, most: int, times: int) -> list[tuple[Tensor, Tensor]]:
    """`times` different places below `count` [n] <= `most`: (place, whether there is none), [n, 1]."""
    outside = torch.arange(most, device=make.device) >= count[:, None]
    order = (torch.rand(outside.shape, device=make.device) + outside).argsort(1)
    return [(order[:, i : i + 1], count[:, None] <= i) for i in range(times)]


def _shuffled(make: Maker, turns: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The same turns, in another order in every row."""
    widths = [max(part.shape[1] for part in parts) for parts in zip(*turns, strict=True)]
    questions, answers = (
        torch.stack([_widen(x, width, HOLE) for x in parts], 1)
        for parts, width in zip(zip(*turns, strict=True), widths, strict=True)
    )  # [n, turns, w] each
    missing = (answers == HOLE).all(2)
    order = (torch.rand(missing.shape, device=make.device) + missing).argsort(1)[..., None]
    questions, answers = (x.gather(1, order.expand_as(x)) for x in (questions, answers))
    return list(zip(questions.unbind(1), answers.unbind(1), strict=True))


def _map(make: Maker, n: int, name: str) -> Asked:
    """One digit in a small picture, and a table of letters in the text."""
    tokens, letter, digit, asked, _ = _pairs(make, n)
    scene = make.scatter(n, SIZES[name], make.randint(1, 1, n), 1)
    scene = replace(scene, digit=_widen(digit.gather(1, asked), MAX_SLOTS, 0))
    question = make.ask(n, "Given", tokens, ". Which letter has the digit?")
    return Asked(question, make.words.answer_letters[letter.gather(1, asked)], scene)


def _add_turn(make: Maker, n: int) -> tuple[Tensor, Tensor]:
    pick = make.sums[torch.randint(len(make.sums), (n,), device=make.device)]
    a, b = pick // 100, pick % 100
    question = make.ask(n, "What is ", _number(make, a, 2), "+", _number(make, b, 2), "?")
    return question, _number(make, a + b, 3)


def _number(make: Maker, value: Tensor, width: int) -> Tensor:
    """[n] as digit tokens [n, width], holes in place of leading zeros."""
    digits = torch.stack([value // 10**i % 10 for i in reversed(range(width))], 1)
    empty = torch.stack(
        [value < 10**i if i else torch.zeros_like(value, dtype=torch.bool) for i in reversed(range(width))], 1
    )
    return make.digit_tokens(digits).masked_fill(empty, HOLE)


def _add(make: Maker, n: int, name: str) -> Asked:
    return Asked(*_add_turn(make, n))


def _add_talk(make: Maker, n: int, name: str) -> Asked:
    (question, answer), *later = (_add_turn(make, n) for _ in range(TALK_TURNS))
    return Asked(question, answer, later=tuple(later))


def _copy(make: Maker, n: int, name: str) -> Asked:
    low, high = COPY_LENGTHS
    tokens = make.digit_tokens(make.randint(0, 9, n, high), make.randint(low, high, n))
    return Asked(make.ask(n, "Copy ", tokens, "."), tokens)


TASKS: dict[str, Callable[[Maker, int, str], Asked]] = {
    "read": _read,
    "count": _count,
    "count_colour": _count_colour,
    "colour": _colour,
    "where": _where,
    "compare": _compare,
    "scene": _scene,
    "map": _map,
    "lookup": _lookup,
    "lookup_talk": _lookup_talk,
    "recall": _recall,
    "describe": _describe,
    "talk": _talk,
    "add": _add,
    "add_talk": _add_talk,
    "copy": _copy,
}

"""Questions about charts, tables, pages, forms and several pictures, as batches of the shapes that the model takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lab import lab_charts, lab_pages
from lab.lab_sample import HELD_OUT, SIZES, TRAIN, Dice, Sample, Task
from lab.lab_tasks import NO_LABEL, Group
from lab.lab_tokens import IMAGE, PAD, VISION_END, VISION_START, Vocabulary

TASKS: dict[str, Task] = {
    task.__name__: task
    for task in (
        *(lab_charts.bar_value, lab_charts.bar_extreme, lab_charts.line_value, lab_charts.pie_extreme),
        *(lab_charts.table_cell, lab_charts.table_extreme, lab_pages.form_field),
        *(lab_pages.read_word, lab_pages.read_line, lab_pages.next_word),
        *(lab_pages.count, lab_pages.more, lab_pages.which_shows, lab_pages.compare_bars),
        *(lab_pages.copy, lab_pages.lookup, lab_pages.chain, lab_pages.maximum),
    )
}
OCR_TASKS = ("read_word", "read_line", "next_word", "form_field")
# Samples of a batch, drawn in these shares. What is read off charts, tables and pages is learned last, and has most.
TRAIN_MIX = {
    "text": {"copy": 4, "lookup": 8, "chain": 8, "maximum": 4},
    "plate": {"read_word": 36, "count": 20},
    "sheet": {
        **{"bar_value": 14, "bar_extreme": 10, "line_value": 12, "pie_extreme": 8, "table_cell": 14},
        **{"table_extreme": 10, "read_line": 12, "next_word": 12, "form_field": 8},
    },
    "large": {"bar_value": 2, "table_cell": 2, "read_line": 2, "next_word": 2, "form_field": 2},
    "pair": {"more": 4, "which_shows": 6, "compare_bars": 8},
    "trio": {"more": 2, "which_shows": 2, "compare_bars": 4},
}
JUDGED = {  # each task by itself: one question a picture
    size: dict.fromkeys(tasks, 4 if size == "large" else 8) for size, tasks in TRAIN_MIX.items()
}
# Mixes of requests that clipping is judged on.
MIXES = {
    "training": {
        "text": {"copy": 5, "lookup": 6, "chain": 6, "maximum": 5},
        "plate": {"read_word": 8, "count": 8},
        "sheet": dict.fromkeys(TRAIN_MIX["sheet"], 3),
        "large": {"table_cell": 1, "read_line": 1},
        "pair": {"more": 4, "which_shows": 4, "compare_bars": 4},
        "trio": {"more": 2, "which_shows": 2, "compare_bars": 2},
    },
    "documents": {
        "text": {"copy": 4, "lookup": 8, "chain": 4},
        "sheet": {"table_cell": 6, "table_extreme": 4, "read_line": 6, "next_word": 6, "form_field": 8},
        "large": {"table_cell": 3, "read_line": 3, "next_word": 3, "form_field": 3},
    },
    "charts": {
        "text": {"maximum": 8, "lookup": 8, "chain": 8},
        "plate": {"count": 12},
        "sheet": {"bar_value": 8, "bar_extreme": 6, "line_value": 8, "pie_extreme": 6},
        "large": {"bar_value": 3},
        "pair": {"more": 6, "compare_bars": 6},
        "trio": {"compare_bars": 4},
    },
}
REDUCED_MIX = {  # of a model that two CPU cores can train
    "text": {"copy": 6, "lookup": 8, "maximum": 4},
    "plate": {"read_word": 8, "count": 16},
}
# Tokens of a training row beside its visual ones: the longest first turn fits; later ones that do not are left out.
TEXT_ROOM = {"text": 128, "plate": 56, "sheet": 128, "large": 128, "pair": 84, "trio": 84}


@dataclass(frozen=True)
class Row:
    """A sample as tokens: ids and labels [L], where labels[i] is what follows ids[i]; tokens of the prompt."""

    ids: list[int]
    labels: list[int]
    prompt: int


class Documents:
    """Draws batches: `batch(mix)` as `lab_tasks.Maker`, from torch's default generator, so by `torch.manual_seed`.

    part: TRAIN, with several questions a picture, or HELD_OUT, with one. Held-out words and contents are never trained
    on (`lab_sample.part_of`).
    """

    def __init__(self, words: Vocabulary, part: str):
        self.words, self.part, self.device = words, part, words.device

    def batch(self, mix: dict[str, dict[str, int]]) -> list[Group]:
        """One group per picture size of `mix`, in its order."""
        return [self.group(size, tasks) for size, tasks in mix.items() if tasks]

    def group(self, name: str, tasks: dict[str, int]) -> Group:
        seed = int(torch.randint(2**62, ()))
        samples = self.samples(name, tasks, seed)
        rows = [self.row(s, name) for s in samples]
        ids, labels, prompt, length = padded(rows, max(len(r.ids) for r in rows))
        pictures = None if SIZES[name] is None else torch.from_numpy(np.concatenate([pixels(s) for s in samples]))
        made = Group(name, SIZES[name], ids, labels, prompt, length, pictures, tuple(tasks.items()))
        return made.to(self.device)

    def samples(self, name: str, tasks: dict[str, int], seed: int) -> list[Sample]:
        dice = Dice(seed, self.part)
        return [dice.make(TASKS[task], name) for task, n in tasks.items() for _ in range(n)]

    def row(self, sample: Sample, name: str) -> Row:
        """Its prompt and answer; in training all turns for which there is room."""
        size, ids, labels, prompt = SIZES[name], [], [], 0
        image = [] if size is None else [VISION_START, *[IMAGE] * size.tokens, VISION_END] * size.pictures
        turns = sample.turns if self.part == TRAIN else sample.turns[:1]
        for i, (question, answer) in enumerate(turns):
            opening = self._ids("\n<|im_start|>user\n" if i else "<|im_start|>user\n")
            asked = [*opening, *([] if i else image), *self._ids(f"{question}<|im_end|>\n<|im_start|>assistant\n")]
            said = self._ids(f"{answer}<|im_end|>")
            if i and len(ids) - len(image) + len(asked) + len(said) > TEXT_ROOM[name]:
                break
            prompt = prompt or len(asked)
            ids += [*asked, *said]
            labels += [*[NO_LABEL] * len(asked), *said]
        return Row(ids, [*labels[1:], NO_LABEL], prompt)

    def _ids(self, text: str) -> list[int]:
        return self.words.tokenizer.encode(text).ids


def pixels(sample: Sample) -> np.ndarray:
    """[pictures, 3, height, width] u8."""
    return np.stack(sample.draw())


def padded(rows: Sequence[Row], width: int) -> tuple[torch.Tensor, ...]:
    """ids, labels [n, width], prompt, length [n] i64."""
    ids, labels = torch.full((len(rows), width), PAD), torch.full((len(rows), width), NO_LABEL)
    for i, row in enumerate(rows):
        if len(row.ids) > width:
            raise ValueError(f"a row of {len(row.ids)} tokens where {width} fit: TEXT_ROOM is too small")
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    return ids, labels, torch.tensor([r.prompt for r in rows]), torch.tensor([len(r.ids) for r in rows])


def width_of(name: str) -> int:
    """Tokens of a training row of this picture size, padding included."""
    size = SIZES[name]
    return TEXT_ROOM[name] + (0 if size is None else size.pictures * (size.tokens + 2))


def makers(tokenizer: Path) -> tuple[Documents, Documents]:
    """Of held-out and of training contents, on the CPU."""
    words = Vocabulary(tokenizer)
    return Documents(words, HELD_OUT), Documents(words, TRAIN)

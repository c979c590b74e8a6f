"""What a task on documents makes: a picture that is drawn later, and questions about it with their answers."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lab.lab_pictures import Size

SIZES = {
    "text": None,
    "plate": Size(64, 128),  # 32 visual tokens
    "sheet": Size(192, 256),  # 192
    "large": Size(320, 384),  # 480
    "pair": Size(96, 128, 2),  # 48 each
    "trio": Size(96, 128, 3),
}
TURNS = 5  # questions about one picture at most
TRAIN, HELD_OUT = "train", "held_out"
HELD_OUT_SHARE = 6  # one in so many words and contents is never trained on
ONSETS, VOWELS, CODAS = "bdfgklmnprstvz", "aeiou", ("", "", "n", "r", "s", "l", "t")

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sample:
    """content: what the answers follow from, told apart by `repr`; turns: questions and answers; draw: the pictures,
    each [3, height, width] u8.
    """

    content: tuple
    turns: Turns
    draw: Callable[[], list[np.ndarray]] = list


def part_of(content: object) -> str:
    """TRAIN or HELD_OUT, for ever the same: by a checksum of what is said."""
    return HELD_OUT if zlib.crc32(repr(content).encode()) % HELD_OUT_SHARE == 0 else TRAIN


class Dice(random.Random):
    """Random choices of one part: words are of that part, and so is every sample that `sample` lets pass."""

    def __init__(self, seed: int, part: str):
        super().__init__(seed)
        self.part = part

    def word(self, longest: int = 6) -> str:
        """A made-up word of 3 to `longest` letters."""
        while True:
            syllables = [self.choice(ONSETS) + self.choice(VOWELS) + self.choice(CODAS) for _ in range(2)]
            word = "".join(syllables)[: self.randint(3, longest)]
            if part_of(word) == self.part:
                return word

    def words(self, count: int, longest: int = 6) -> list[str]:
        """All different, none the beginning of another."""
        found: list[str] = []
        while len(found) < count:
            word = self.word(longest)
            if not any(word.startswith(x) or x.startswith(word) for x in found):
                found.append(word)
        return found

    def number(self, digits: int) -> str:
        """Without a leading zero."""
        return str(self.randint(10 ** (digits - 1), 10**digits - 1))

    def order(self, count: int) -> list[int]:
        """All numbers below `count`, in any order."""
        return self.sample(range(count), count)

    def make(self, task: "Task", name: str) -> Sample:
        """Of the dice's part."""
        while True:
            sample = task(self, name)
            if part_of(sample.content) == self.part:
                return sample


Task = Callable[[Dice, str], Sample]  # of dice and the name of a picture size

"""The lab's tasks as a person or a server sees them: text, picture file and expected answer."""

import io
from dataclasses import dataclass

import torch

from lab import lab_material
from lab.lab_checkpoint import CHECKPOINT
from lab.lab_tasks import Group, Maker
from lab.lab_tokens import VISION_END, Vocabulary


@dataclass(frozen=True)
class Question:
    """One user turn: its task, text, pictures (PNG bytes) and the right answer."""

    task: str
    text: str
    pictures: tuple[bytes, ...]
    answer: str


def questions(mix: dict[str, dict[str, int]], seed: int) -> list[Question]:
    """Held-out questions, `mix` as in `lab_tasks.TRAIN_MIX`."""
    make = Maker(Vocabulary(CHECKPOINT / "tokenizer.json"), lab_material.load("held_out"), "held_out")
    torch.manual_seed(seed)
    return [question for group in make.batch(mix) for question in of_group(group, make.words)]


def of_group(group: Group, words: Vocabulary) -> list[Question]:
    """A group's samples, in order."""
    tasks = [task for task, n in group.tasks for _ in range(n)]
    found = []
    for row, task in enumerate(tasks):
        prompt, length = int(group.prompt[row]), int(group.length[row])
        whole = words.tokenizer.decode(group.ids[row, :prompt].tolist(), skip_special_tokens=False)
        _, asked = whole.split("<|im_end|>")[0].split("<|im_start|>user\n")
        shown = () if group.size is None else range(row * group.size.pictures, (row + 1) * group.size.pictures)
        text = asked.split(words.tokenizer.id_to_token(VISION_END))[-1] if shown else asked
        pictures = tuple(png(group.pictures[i]) for i in shown)
        found.append(Question(task, text, pictures, words.text(group.ids[row, prompt : length - 1])))
    return found


def png(picture: torch.Tensor) -> bytes:
    """[3, height, width] in 0..255 as a file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).byte().numpy()).save(buffer, "PNG")
    return buffer.getvalue()

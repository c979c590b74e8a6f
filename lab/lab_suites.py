"""The two studies: a model, its tasks, and the mixes of requests that it is trained and judged on."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from lab import lab_checkpoint, lab_documents, lab_material, lab_tasks
from lab.lab_architecture import GLM, Architecture
from lab.lab_sample import HELD_OUT, TRAIN
from lab.lab_tokens import Vocabulary

Mix = dict[str, dict[str, int]]  # samples of each task by picture size

# 27 M parameters: 12 MoE layers of 64 experts in 8 groups, top-6 within the best 4.
DOCUMENTS = Architecture(
    family=GLM,
    hidden=160,
    layers=13,
    heads=4,
    kv_heads=2,
    head_dim=64,
    experts=64,
    top_k=6,
    intermediate=64,
    vision_hidden=128,
    vision_heads=4,
    vision_depth=6,
    vision_intermediate=320,
    deepstack=(),
    position_side=24,
    eps=1e-5,
    dense=1,
    shared=64,
    groups=8,
    topk_groups=4,
    scaling=1.5,
)
# 1.3 M parameters, of the same kind.
DOCUMENTS_SMALL = Architecture(
    family=GLM,
    hidden=96,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=32,
    experts=32,
    top_k=4,
    intermediate=32,
    vision_hidden=64,
    vision_heads=2,
    vision_depth=2,
    vision_intermediate=128,
    deepstack=(),
    position_side=16,
    mrope_section=(4, 2, 2),
    eps=1e-5,
    dense=1,
    shared=32,
    groups=4,
    topk_groups=2,
    scaling=1.5,
)


@dataclass(frozen=True)
class Suite:
    """architecture: of the model that is trained; checkpoint: where the committed one lies; train: a step's samples;
    judged: each task by itself, so many samples, `repeats` times by size; mixes: what clipping is judged on; ocr: tasks
    that are read off.
    """

    name: str
    architecture: Architecture
    checkpoint: Path
    train: Mix
    judged: Mix
    repeats: dict[str, int]
    mixes: dict[str, Mix]
    ocr: tuple[str, ...]
    sample: Mix  # small batches that a profile is recorded from
    material: bool = field(default=False)  # whether it is made of lab_material's digits

    def makers(self, tokenizer: Path, material: Path | None = None, device: torch.device | str = "cpu") -> tuple:
        """What draws held-out and training samples, each with a few distortions of its digits."""
        words = Vocabulary(tokenizer, device)
        if not self.material:
            return lab_documents.Documents(words, HELD_OUT), lab_documents.Documents(words, TRAIN)
        held_out = lab_tasks.Maker(words, lab_material.load("held_out", device, material), "held_out")
        return held_out, lab_tasks.Maker(words, lab_material.load("train", device, material, variants=2), "train")


DIGITS_MIXES = {
    "training": {
        "text": {"copy": 6, "lookup": 10, "add": 6},
        "tiny": {"map": 10},
        "wide": {"read": 10, "compare": 4, "colour": 6, "where": 4},
        "square": {"read": 4, "count": 4, "count_colour": 6, "colour": 6, "where": 6, "compare": 4},
        "large": {"read": 4, "count": 2, "colour": 3, "where": 3, "scene": 3},
        "huge": {"read": 2},
    },
    "documents": {  # strings to read
        "text": {"copy": 12, "lookup": 8},
        "wide": {"read": 30, "compare": 8},
        "large": {"read": 6},
        "huge": {"read": 3},
    },
    "pictures": {  # large pictures
        "text": {"copy": 8, "lookup": 16},
        "square": {"count": 8, "count_colour": 8, "colour": 8, "where": 8},
        "large": {"scene": 4, "count": 4, "colour": 6, "where": 6, "read": 3},
        "huge": {"read": 2, "colour": 2, "where": 2},
    },
}
DIGITS_SAMPLE = {"text": {"add": 1, "copy": 1, "lookup": 1}, "tiny": {"map": 1}, "wide": {"read": 1, "compare": 1}}
DIGITS_SAMPLE |= {"square": {"read": 1, "count": 1, "colour": 1, "where": 1}, "large": {"read": 1, "scene": 1}}


def _one_of_each(mix: Mix) -> Mix:
    return {size: dict.fromkeys(tasks, 1) for size, tasks in mix.items()}


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "digits",
            Architecture(),
            lab_checkpoint.CHECKPOINT,
            lab_tasks.TRAIN_MIX,
            lab_tasks.JUDGED,
            {"text": 4, "tiny": 4, "wide": 4, "square": 6, "large": 16, "huge": 24},
            DIGITS_MIXES,
            lab_tasks.OCR_TASKS,
            DIGITS_SAMPLE,
            material=True,
        ),
        Suite(
            "documents",
            DOCUMENTS,
            lab_checkpoint.ROOT / "build" / "lab-run" / "documents",
            lab_documents.TRAIN_MIX,
            lab_documents.JUDGED,
            {"text": 6, "plate": 6, "sheet": 6, "large": 6, "pair": 6, "trio": 6},
            lab_documents.MIXES,
            lab_documents.OCR_TASKS,
            _one_of_each(lab_documents.TRAIN_MIX),
        ),
        Suite(
            "documents-small",
            DOCUMENTS_SMALL,
            lab_checkpoint.DOCUMENTS,
            lab_documents.REDUCED_MIX,
            {size: dict.fromkeys(tasks, 24) for size, tasks in lab_documents.REDUCED_MIX.items()},
            {"text": 1, "plate": 2},
            {"small": {size: dict.fromkeys(tasks, 16) for size, tasks in lab_documents.REDUCED_MIX.items()}},
            ("read_word",),
            _one_of_each(lab_documents.REDUCED_MIX),
        ),
    )
}

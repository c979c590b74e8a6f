"""Greedy tokens of transformers' own implementation: what a served model must answer, token for token."""

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.questions import NEW_TOKENS, Question
from benchmarks.serving import photograph_files
from sglang_macs import cpu_compat, tiny_models


@dataclass(frozen=True)
class Answer:
    """Generated `ids`, the distance between the two best logits at each, and the prompt's length in tokens."""

    ids: list[int]
    margins: list[float]
    prompt_tokens: int


class Reference:
    """The checkpoint at `path` in transformers, in bfloat16 on CPU; takes the `-hfref` twin where there is one."""

    def __init__(self, path: Path | str):
        cpu_compat.allow_torchvision()
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

        path = tiny_models.reference_path(path)
        visual = hasattr(AutoConfig.from_pretrained(path), "vision_config")
        loader = AutoModelForImageTextToText if visual else AutoModelForCausalLM
        self.processor = AutoProcessor.from_pretrained(path)  # the tokenizer alone, for a text model
        self.model = loader.from_pretrained(path, dtype=torch.bfloat16).eval()

    @functools.cache  # noqa: B019 - one reference per test session
    def answer(self, question: Question, new_tokens: int = NEW_TOKENS) -> Answer:
        """Greedy continuation of `question`."""
        inputs = self._inputs(question)
        length = inputs["input_ids"].shape[1]
        out = self.model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(out.logits).float().topk(2).values[:, 0]  # [new_tokens, 2]
        return Answer(out.sequences[0, length:].tolist(), (best[:, 0] - best[:, 1]).tolist(), length)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return len(tokenizer(text)["input_ids"])

    def _inputs(self, question: Question) -> dict[str, torch.Tensor]:
        if question.image is None:
            return self.processor(text=[question.prompt], return_tensors="pt")
        from PIL import Image

        photograph = Image.open(io.BytesIO(photograph_files()[question.image]))
        return self.processor(text=[question.prompt], images=[photograph], return_tensors="pt")

"""From recorded routing to a profile: which experts serve which modality, and how sure that is.

A recording is a list of samples (a request, a batch, or what a server counted between two looks). The sample is the
unit of the test, not the row: rows of one image are anything but independent.
"""

import hashlib
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import MacsError
from .profile import Evidence, Profile

MIN_SAMPLES = 20  # fewer than this with both modalities, and the test's normal approximation means little
FALSE_DISCOVERIES = 0.01  # of the experts that are called visual or text, by Benjamini and Hochberg
RATIO = 1.25  # an expert's share of one modality over its share of the other, from which on the difference matters


@dataclass(frozen=True)
class Recording:
    """rows [S, layers, E, 2] i64: assignments by sample, layer, expert, and (visual, text); layers: their ids."""

    rows: Tensor
    layers: list[int]

    def part(self, samples: Tensor | slice) -> "Recording":
        """Some of the samples."""
        return Recording(self.rows[samples], self.layers)


def modalities(recording: Recording) -> tuple[Tensor, Tensor]:
    """modality [layers, E] i8 in -1, 0, +1, and p [layers, E] f64 of "serves both alike".

    An expert is visual where its share of the visual rows exceeds its share of the text rows, significantly over the
    samples and by `RATIO`. Raises MacsError where too few samples hold both modalities.
    """
    rows = recording.rows.double()
    total = rows.sum(2, keepdim=True)  # [S, layers, 1, 2]
    mixed = (total > 0).all(-1).flatten(1).all(1)
    if int(mixed.sum()) < MIN_SAMPLES:
        raise MacsError(
            "calibration", f"{int(mixed.sum())} samples with image and text", f"at least {MIN_SAMPLES}", "Record more."
        )
    share = (rows / total.clamp(min=1))[mixed]  # [S', layers, E, 2]
    difference = share[..., 0] - share[..., 1]
    error = difference.std(0) / math.sqrt(len(difference))
    p = torch.special.erfc(difference.mean(0).abs() / error.clamp(min=1e-12) / math.sqrt(2))
    p = torch.where(difference.mean(0) == 0, 1.0, p)
    visual, text = (share[..., i].mean(0) for i in (0, 1))
    sure = _discoveries(p)
    sign = torch.where(visual > RATIO * text, 1, torch.where(text > RATIO * visual, -1, 0))
    return (sign * sure).to(torch.int8), p


def _discoveries(p: Tensor) -> Tensor:
    """Benjamini and Hochberg's choice among all tests of `p`, as a mask of its shape."""
    flat, order = p.flatten().sort()
    rank = torch.arange(1, len(flat) + 1, dtype=torch.float64)
    passing = torch.nonzero(flat <= FALSE_DISCOVERIES * rank / len(flat))
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    if len(passing):
        chosen[order[: int(passing.max()) + 1]] = True
    return chosen.view(p.shape)


def make_profile(recording: Recording, architecture: str, fingerprint: str) -> Profile:
    """The profile with the evidence behind it."""
    modality, p = modalities(recording)
    rows = recording.rows.sum(0)
    evidence = Evidence(
        samples=len(recording.rows),
        rows={layer: rows[i].tolist() for i, layer in enumerate(recording.layers)},
        p_value={layer: [float(f"{x:.3g}") for x in p[i].tolist()] for i, layer in enumerate(recording.layers)},
        fingerprint=fingerprint,
    )
    by_layer = {layer: modality[i].tolist() for i, layer in enumerate(recording.layers)}
    return Profile(architecture, rows.shape[1], by_layer, evidence)


def agreement(one: Profile, other: Profile) -> float:
    """Share of experts that two profiles of a model put alike."""
    same = [a == b for layer, row in one.modality.items() for a, b in zip(row, other.modality[layer], strict=True)]
    return sum(same) / len(same)


def fingerprint(model_path: str | Path) -> str:
    """sha256 over the routers' weights of a safetensors checkpoint: they decide what the profile describes."""
    from safetensors import safe_open

    files = sorted(Path(model_path).glob("*.safetensors"))
    if not files:
        raise MacsError("model", f"no *.safetensors in {model_path}", "a local checkpoint")
    digest = hashlib.sha256()
    for file in files:
        with safe_open(str(file), "pt") as tensors:
            for name in sorted(n for n in tensors.keys() if n.endswith("mlp.gate.weight")):  # noqa: SIM118
                digest.update(name.encode())
                digest.update(tensors.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- from a running server ---------------------------------------------------------------------------------------------


def watch_server(url: str, samples: int, interval: float, patience: float) -> Recording:
    """A recording of what the server at `url` routes meanwhile: one sample per look that finds both modalities.

    Raises MacsError if the server does not answer, does not run MACS, or has no traffic for `patience` seconds.
    """
    found: list[Tensor] = []
    layers, last = _expert_rows(url)
    quiet_since = time.monotonic()
    while len(found) < samples:
        time.sleep(interval)
        layers, now = _expert_rows(url)
        new = now - last if last.shape == now.shape else now
        if (new.sum(1) > 0).all():  # rows of both modalities in every layer
            found.append(new)
            last, quiet_since = now, time.monotonic()
        elif time.monotonic() - quiet_since > patience:
            raise MacsError(
                "calibration",
                f"{len(found)} of {samples} samples, and no mixed traffic for {patience:.0f} s",
                "requests with images and text",
                "Send prompts to the server, started with --macs-gamma inf.",
            )
    return Recording(torch.stack(found), layers)


def _expert_rows(url: str) -> tuple[list[int], Tensor]:
    """Layer ids, and rows [layers, E, 2] i64 summed over the ranks, since the server's start."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/server_info", timeout=30) as answer:
            info = json.load(answer)
    except (urllib.error.URLError, ValueError, OSError) as error:
        raise MacsError("--server", f"{url} ({error})", "a running server's address") from error
    states = [s["macs"] for s in info.get("internal_states", []) if s.get("macs")]
    if not states:
        raise MacsError("--server", f"{url} without MACS", "a server with --moe-a2a-backend macs")
    tables = [s.get("expert_rows", {}) for s in states]
    layers = sorted({int(layer) for table in tables for layer in table})
    if not layers:
        return [], torch.zeros(0, 0, 2, dtype=torch.long)
    rows = [sum(torch.tensor(t[str(layer)]) for t in tables if str(layer) in t) for layer in layers]
    return layers, torch.stack(rows)


# -- from a dataset ----------------------------------------------------------------------------------------------------


def replay(model_path: str, dataset: str, per_sample: int = 2) -> Recording:
    """A recording of transformers running `model_path` over a dataset, `per_sample` prompts to a sample.

    dataset: JSON lines {"text": ..., "images": [paths]}, paths relative to the file.
    """
    from .cpu_compat import allow_torchvision

    allow_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model_path)
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32).eval()
    routers = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    experts, image_token = model.config.text_config.num_experts, model.config.image_token_id
    seen: list[Tensor] = []
    for router in routers:
        router.register_forward_hook(lambda _, __, output: seen.append(output[2]))  # (logits, weights, ids [T, K])
    found, current, prompts = [], torch.zeros(len(routers), experts, 2, dtype=torch.long), 0
    for inputs in _prompts(processor, dataset):
        seen.clear()
        with torch.no_grad():
            model(**inputs)
        text = (inputs["input_ids"].flatten() != image_token).long()
        current += torch.stack([count_rows(ids, text, experts) for ids in seen])
        prompts += 1
        if prompts % per_sample == 0:
            found.append(current)
            current = torch.zeros_like(current)
    if not found:
        raise MacsError("--dataset", f"{dataset} with {prompts} prompts", f"at least {per_sample * MIN_SAMPLES}")
    return Recording(torch.stack(found), list(range(len(routers))))


def count_rows(ids: Tensor, text: Tensor, num_experts: int) -> Tensor:
    """[E, 2] i64: assignments by expert and (visual, text) of ids [T, K]; text [T] in {0, 1}; id -1 counts nowhere."""
    cells = torch.where(ids >= 0, ids * 2 + text[:, None], 2 * num_experts).flatten()
    return torch.bincount(cells, minlength=2 * num_experts + 1)[:-1].view(num_experts, 2)


def _prompts(processor, dataset: str) -> Iterator[dict]:
    from PIL import Image

    path = Path(dataset)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MacsError("--dataset", f"{path} ({error.strerror})", "a readable file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            images = [Image.open(path.parent / name).convert("RGB") for name in item.get("images", [])]
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": item["text"]}]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise MacsError(
                "--dataset", f"line {number} of {path} ({error!r})", '{"text": ..., "images": [...]}'
            ) from error
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        yield processor(text=[text], images=images or None, return_tensors="pt")

"""From recorded routing to a profile: which experts serve which modality, and how sure that is.

A recording is a list of samples (a request, a batch, or what a server counted between two looks). The sample is the
unit of the test, not the row: rows of one image are anything but independent.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor

from .. import __version__, files
from ..choices import MODALITIES
from ..config import OFF
from ..errors import MacsError
from ..plan.profile import Evidence, Profile
from .server_info import Server, State, missing_ranks, ranks

MIN_SAMPLES = 20  # fewer than this with both modalities, and the test's normal approximation means little
FALSE_DISCOVERIES = 0.01  # of the experts that are called visual or text, by Benjamini and Hochberg
ROUTER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:mlp|moe|feed_forward|block_sparse_moe)\.(?:gate|router)\.weight$")
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
    adjusted = stats.false_discovery_control(p.flatten().numpy())
    return torch.from_numpy(adjusted <= FALSE_DISCOVERIES).view(p.shape)


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


@dataclass(frozen=True)
class Routers:
    """Of a checkpoint: the layers that have one, and the sha256 of the weights, which say what a profile is about."""

    layers: frozenset[int]
    fingerprint: str


def routers(model_path: str | Path, num_layers: int | None = None) -> Routers:
    """Reads a local safetensors checkpoint. num_layers: what lies behind so many drafts tokens, and is
    left out of `layers`. Raises MacsError where there is no checkpoint, or none with routers.
    """
    from safetensors import SafetensorError, safe_open

    shards = sorted(Path(model_path).glob("*.safetensors"))
    if not shards:
        raise MacsError("--model-path", f"no *.safetensors in {model_path}", "a local checkpoint")
    digest, layers = hashlib.sha256(), set()
    for file in shards:
        try:
            with safe_open(str(file), "pt") as tensors:
                for name in sorted(n for n in tensors.keys() if ROUTER.search(n)):  # noqa: SIM118
                    layers.add(int(ROUTER.search(name)[1]))
                    digest.update(name.encode())
                    digest.update(tensors.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
        except (SafetensorError, OSError) as error:
            raise MacsError("--model-path", f"{file} ({error})", "a whole checkpoint") from error
    serving = frozenset(layer for layer in layers if num_layers is None or layer < num_layers)
    if not serving:
        raise MacsError("--model-path", f"{model_path} without layers.N.mlp.gate.weight", "a mixture-of-experts model")
    return Routers(serving, digest.hexdigest())


def check_layers(recorded: Iterable[int], expected: Iterable[int]) -> None:
    """Raises MacsError unless a recording has every layer that the model routes in, and no other."""
    recorded, expected = set(recorded), set(expected)
    if recorded - expected:
        found = f"layers {sorted(recorded - expected)}, which the checkpoint does not have"
        raise MacsError("calibration", found, "the model at --model-path", "Is it the one that is served?")
    if expected - recorded:
        found = f"no rows in layers {sorted(expected - recorded)}"
        raise MacsError("calibration", found, "rows in all", "A profile without them cannot be served.")


# -- from a running server ---------------------------------------------------------------------------------------------


def watch_server(server: Server, layers: Iterable[int], samples: int, interval: float, patience: float) -> Recording:
    """A recording of what `server` routes meanwhile: one sample per look that finds both modalities in all `layers`.

    After a look without an answer of every rank, and where the server has started again, the next one begins anew.
    Raises MacsError if the first look is such a one, after `patience` seconds without a sample, and at once where the
    server may clip: what it counts then is not what the router chose.
    """
    layers = sorted(layers)
    found: list[Tensor] = []
    states = _states_of_all(server)
    last: Tensor | None = _expert_rows(states, layers)
    answering, quiet_since = ranks(states)[0], time.monotonic()
    without, trouble = "", None
    while len(found) < samples:
        if time.monotonic() - quiet_since > patience:
            raise trouble or _no_traffic(len(found), samples, patience, without)
        time.sleep(interval)
        try:
            states, trouble = _states_of_all(server), None
        except MacsError as error:
            last, trouble = None, error
            continue
        now = _expert_rows(states, layers)
        if last is None or _fewer(now, last) or ranks(states)[0] != answering:
            last, answering = now, ranks(states)[0]
            continue
        new = now - last if now.shape == last.shape else now
        seen = new.sum(1) > 0  # [layers, 2]
        without = _without(seen, layers)
        if not without:
            found.append(new)
            last, quiet_since = now, time.monotonic()
    return Recording(torch.stack(found), layers)


def _states_of_all(server: Server) -> list[State]:
    """Raises MacsError where a rank's counters are missing, too."""
    states = server.states()
    if missing := missing_ranks(states):
        fix = "Serve with --dp equal to --tp and --enable-dp-attention while you calibrate."
        raise MacsError("server", missing, "every rank's", fix)
    return states


def _fewer(now: Tensor, last: Tensor) -> bool:
    """Whether counters fell, as they do where a server has started again. E is 0 before any traffic."""
    return now.shape[1] < last.shape[1] or (now.shape == last.shape and bool((now < last).any()))


def _without(seen: Tensor, layers: list[int]) -> str:
    """In words, what of [layers, 2] is missing; "" if nothing is."""
    if seen.all():
        return ""
    if not seen.any():
        return "no rows in any layer"
    lacking = {
        modality: [layer for layer, there in zip(layers, column, strict=True) if not there]
        for modality, column in zip(MODALITIES, seen.T.tolist(), strict=True)
    }
    return " and ".join(f"no {modality} rows in layers {of}" for modality, of in lacking.items() if of)


def _no_traffic(found: int, samples: int, patience: float, without: str) -> MacsError:
    got = f"{found} of {samples} samples, and no mixed traffic for {patience:.0f} s ({without or 'no second look'})"
    fix = "Send it prompts meanwhile: other than are in its prefix cache, and in batches of --macs-min-tokens or more."
    return MacsError("calibration", got, "requests with images and text", fix)


def _expert_rows(states: list[State], layers: list[int]) -> Tensor:
    """Rows [layers, E, 2] i64 summed over the ranks, since the server's start; E is 0 before any traffic. Raises
    MacsError unless the server runs at infinite gamma.
    """
    for state in states:
        config = state.get("config")
        if isinstance(config, Mapping) and (config.get("gamma") != "inf" or config.get("preset") in OFF):
            got = f"one at gamma {config.get('gamma')}, preset {config.get('preset')}"
            raise MacsError("server", got, "one that clips nothing", "Start it with --macs-gamma inf.")
    tables = [state.get("expert_rows") for state in states]
    try:
        named = {int(layer) for table in tables for layer in table}
        check_layers(named.union(layers), layers)  # one without rows so far is there later, or missed then
        found = {layer: [_rows(table[str(layer)]) for table in tables if str(layer) in table] for layer in layers}
        experts = next((rows[0].shape[0] for rows in found.values() if rows), 0)
        return torch.stack([sum(found[layer], torch.zeros(experts, 2, dtype=torch.long)) for layer in layers])
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, MacsError):
            raise
        versions = ", ".join(sorted({str(state.get("version")) for state in states}))
        got = f"expert_rows of another form from sglang-macs {versions} ({error})"
        raise MacsError("server", got, f"those of {__version__}", "Calibrate with the server's own version.") from error


def _rows(table: object) -> Tensor:
    """[E, 2] i64. Raises TypeError, ValueError, RuntimeError for what is no table of counters."""
    rows = torch.tensor(table)
    if rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[1] != 2 or (rows < 0).any():
        raise ValueError(f"{rows.dtype} of shape {list(rows.shape)}")
    return rows


# -- from a dataset ----------------------------------------------------------------------------------------------------


def replay(model_path: str, dataset: str, per_sample: int = 2) -> Recording:
    """A recording of transformers running `model_path` over a dataset, `per_sample` prompts to a sample.

    dataset: JSON lines {"text": ..., "images": [paths]}, paths relative to the file.
    """
    lines = files.read(dataset, "--dataset").splitlines()
    processor, model = _load(model_path)
    gates = {int(found[1]): m for n, m in model.named_modules() if (found := ROUTER.search(f"{n}.weight"))}
    experts, image_token = model.config.text_config.num_experts, model.config.image_token_id
    seen: list[Tensor] = []
    for gate in gates.values():
        gate.register_forward_hook(lambda _, __, output: seen.append(output[2]))  # (logits, weights, ids [T, K])
    found, current, prompts = [], torch.zeros(len(gates), experts, 2, dtype=torch.long), 0
    for inputs in _prompts(processor, dataset, lines):
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
    return Recording(torch.stack(found), list(gates))


def _load(model_path: str):
    """transformers' processor and model. Raises MacsError for what they cannot load."""
    from ..cpu_compat import allow_torchvision

    allow_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model_path)
        model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32).eval()
        model.config.text_config.num_experts, model.config.image_token_id  # noqa: B018
    except Exception as error:  # each model and each format has its own
        expected = "a model with images and experts that transformers loads"
        raise MacsError("--model-path", f"{model_path} ({error})", expected, "Or record a server: --server.") from error
    return processor, model


def count_rows(ids: Tensor, text: Tensor, num_experts: int) -> Tensor:
    """[E, 2] i64: assignments by expert and (visual, text) of ids [T, K]; text [T] in {0, 1}; id -1 counts nowhere."""
    cells = torch.where(ids >= 0, ids * 2 + text[:, None], 2 * num_experts).flatten()
    return torch.bincount(cells, minlength=2 * num_experts + 1)[:-1].view(num_experts, 2)


def _prompts(processor, dataset: str, lines: list[bytes]) -> Iterator[dict]:
    from PIL import Image

    path = Path(dataset)
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            images = [Image.open(path.parent / name).convert("RGB") for name in item.get("images", [])]
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "" + item["text"]}]
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OSError,
            RecursionError,
            Image.DecompressionBombError,
        ) as error:
            raise MacsError(
                "--dataset", f"line {number} of {path} ({error!r})", '{"text": ..., "images": [...]}'
            ) from error
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        yield processor(text=[text], images=images or None, return_tensors="pt")

"""Calibration on the lab's model: routing and expert output norms by modality, and what drift does to them.

python lab/lab_calibration.py      # writes the committed profile of the lab's model
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lab_checkpoint
import lab_material
import torch
import torch.nn.functional as F
from lab_judge import as_batch
from lab_methods import Inputs
from lab_model import LabModel, Routing
from lab_tasks import Maker
from lab_tokens import Vocabulary
from torch import Tensor

from sglang_macs.observe import calibration
from sglang_macs.plan import profile

ARCHITECTURE = "Qwen3VLMoeForConditionalGeneration"
# Another mix than the one that is judged on: mostly large pictures, and mostly text.
SHIFTED = {
    "image-heavy": {"large": {"read": 4, "scene": 4, "where": 4}, "huge": {"read": 4, "colour": 4, "where": 4}},
    "text-heavy": {"text": {"add": 24, "copy": 24, "lookup": 24}, "tiny": {"map": 16}},
}
SAMPLE_MIX = {"text": {"add": 1, "copy": 1, "lookup": 1}, "tiny": {"map": 1}, "wide": {"read": 1, "compare": 1}}
SAMPLE_MIX |= {"square": {"read": 1, "count": 1, "colour": 1, "where": 1}, "large": {"read": 1, "scene": 1}}
SAMPLES = 48


@dataclass(frozen=True)
class Recorded:
    """A recording, and the mean output norm of every expert: [layers, E, 2] (visual, text)."""

    recording: calibration.Recording
    norms: Tensor


def record(model: LabModel, make: Maker, mix: dict, batches: int, dtype: torch.dtype, seed: int = 90_000) -> Recorded:
    """Routing over `SAMPLES` small batches, and norms over `batches` of `mix`."""
    device, arch = next(model.parameters()).device, model.arch
    samples = []
    for index in range(SAMPLES):
        torch.manual_seed(seed + index)
        samples.append(torch.stack([_rows(r, arch.experts) for r in _routings(model, make, SAMPLE_MIX, dtype)]))
    total = torch.zeros(arch.layers, arch.experts, 2)
    count = torch.zeros_like(total)
    for index in range(batches):
        torch.manual_seed(seed + SAMPLES + index)
        for r in _routings(model, make, mix, dtype):
            norms = expert_norms(model, r.layer, r.hidden, r.ids)
            cell = (r.ids.clamp(min=0) * 2 + (~r.visual).long()[:, None]).flatten()
            for table, value in ((total, norms), (count, torch.ones_like(norms))):
                value = (value * (r.ids >= 0)).flatten().float()
                table[r.layer] += (
                    torch.zeros(2 * arch.experts, device=device).scatter_add_(0, cell, value).view(-1, 2).cpu()
                )
    return Recorded(calibration.Recording(torch.stack(samples), list(range(arch.layers))), total / count.clamp(min=1))


def _routings(model: LabModel, make: Maker, mix: dict, dtype: torch.dtype) -> list[Routing]:
    device = next(model.parameters()).device
    return model([as_batch(g.to(device)) for g in make.batch(mix)], dtype=dtype)[1]


def _rows(routing: Routing, experts: int) -> Tensor:
    return calibration.count_rows(routing.ids, (~routing.visual).long(), experts).cpu()


def expert_norms(model: LabModel, layer: int, hidden: Tensor, ids: Tensor) -> Tensor:
    """[T, K] f32: norm of what each chosen expert makes of the token; 0 for an empty slot."""
    experts = model.model["language_model"].layers[layer].mlp.experts
    norms = torch.zeros(ids.shape, device=ids.device)
    for expert in range(experts.gate_up_proj.shape[0]):
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        gate, up = F.linear(hidden[token], experts.gate_up_proj[expert].to(hidden.dtype)).chunk(2, -1)
        output = F.linear(F.silu(gate) * up, experts.down_proj[expert].to(hidden.dtype))
        norms[token, slot] = output.float().norm(dim=1)
    return norms


def true_norms(model: LabModel) -> Callable[[Inputs], Tensor]:
    """For `lab_methods.ByNorm`."""
    return lambda given: expert_norms(model, given.layer, given.hidden, given.ids)


def drift(model: LabModel, make: Maker, other: Maker, dtype: torch.dtype) -> dict:
    """How alike profiles come out: of two halves, of unseen digits, and of shifted mixes."""
    recorded = record(model, other, {}, 0, dtype)
    base = _profile(recorded.recording)
    halves = [_profile(recorded.recording.part(slice(i, None, 2))) for i in range(2)]
    found = {
        "experts": {s: sum(row.count(m) for row in base.modality.values()) for s, m in SIGNS.items()},
        "halves_agree": round(calibration.agreement(*halves), 4),
        "unseen_digits_agree": round(
            calibration.agreement(base, _profile(record(model, make, {}, 0, dtype, seed=95_000).recording)), 4
        ),
        "shares": {},
    }
    rows = recorded.recording.rows.sum(0).double()  # [layers, E, 2]
    for name, mix in SHIFTED.items():
        torch.manual_seed(7)
        shifted = torch.stack([_rows(r, model.arch.experts) for r in _routings(model, other, mix, dtype)]).double()
        found["shares"][name] = {
            m: round(_distance(rows[..., i], shifted[..., i]), 4) for i, m in enumerate(("visual", "text"))
        }
    return found


SIGNS = {"visual": 1, "text": -1, "shared": 0}


def _distance(one: Tensor, other: Tensor) -> float:
    """Share of a modality's rows that go to other experts than recorded: total variation, mean over layers."""
    share = [x / x.sum(1, keepdim=True).clamp(min=1) for x in (one, other)]
    return float((share[0] - share[1]).abs().sum(1).mean() / 2)


def _profile(recording: calibration.Recording) -> profile.Profile:
    return calibration.make_profile(recording, ARCHITECTURE, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=lab_checkpoint.CHECKPOINT)
    parser.add_argument("--material", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = lab_checkpoint.load(options.checkpoint, options.device)
    model.experts_by = "loop" if options.device == "cpu" else "dense"
    words = Vocabulary(options.checkpoint / "tokenizer.json")
    make = Maker(words, lab_material.load("train", path=options.material, variants=2), "train")
    with torch.no_grad():
        recorded = record(model, make, {}, 0, torch.float32)
    made = calibration.make_profile(
        recorded.recording, ARCHITECTURE, calibration.routers(options.checkpoint).fingerprint
    )
    profile.save(made, str(options.checkpoint / "profile.json"))
    print({name: sum(row.count(m) for row in made.modality.values()) for name, m in SIGNS.items()})


if __name__ == "__main__":
    main()

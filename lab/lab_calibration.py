"""Calibration on a lab's model: routing and expert output norms by modality, and what drift does to them.

python -m lab.lab_calibration [--suite documents --checkpoint FOLDER]      # writes FOLDER's profile.json
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lab import lab_checkpoint
from lab.lab_architecture import GLM, QWEN, Routing
from lab.lab_judge import as_batch
from lab.lab_methods import Inputs
from lab.lab_model import LabModel
from lab.lab_suites import SUITES, Mix
from sglang_macs.observe import calibration
from sglang_macs.plan import profile

ARCHITECTURES = {QWEN: "Qwen3VLMoeForConditionalGeneration", GLM: "Glm4vMoeForConditionalGeneration"}
# Another mix than the one that is judged on: mostly large pictures, and mostly text.
SHIFTED = {
    "image-heavy": {"large": {"read": 4, "scene": 4, "where": 4}, "huge": {"read": 4, "colour": 4, "where": 4}},
    "text-heavy": {"text": {"add": 24, "copy": 24, "lookup": 24}, "tiny": {"map": 16}},
}
SAMPLES = 48


def record(model: LabModel, make, mix: Mix, dtype: torch.dtype, seed: int = 90_000) -> calibration.Recording:
    """Routing over `SAMPLES` small batches of `mix`."""
    arch, samples = model.arch, []
    for index in range(SAMPLES):
        torch.manual_seed(seed + index)
        samples.append(torch.stack([_rows(r, arch.experts) for r in _routings(model, make, mix, dtype)]))
    return calibration.Recording(torch.stack(samples), list(arch.moe_layers))


def rows_by_layer(model: LabModel, make, mixes: dict[str, Mix], dtype: torch.dtype) -> dict[int, Tensor]:
    """[E] rows of each expert over a batch of every mix, by layer: what a placement is made from."""
    found = {layer: torch.zeros(model.arch.experts) for layer in model.arch.moe_layers}
    for index, mix in enumerate(mixes.values()):
        torch.manual_seed(80_000 + index)
        for r in _routings(model, make, mix, dtype):
            found[r.layer] += _rows(r, model.arch.experts).sum(1)
    return found


def mean_norms(model: LabModel, make, mixes: dict[str, Mix], batches: int, dtype: torch.dtype) -> dict[int, Tensor]:
    """The mean output norm of every expert, by layer: [E, 2] (visual, text), over `batches` of the first mix."""
    arch, mix = model.arch, next(iter(mixes.values()))
    total = {layer: torch.zeros(arch.experts, 2) for layer in arch.moe_layers}
    count = {layer: torch.zeros(arch.experts, 2) for layer in arch.moe_layers}
    for index in range(batches):
        torch.manual_seed(85_000 + index)
        for r in _routings(model, make, mix, dtype):
            norms = expert_norms(model, r.layer, r.hidden, r.ids)
            cell = (r.ids.clamp(min=0) * 2 + (~r.visual).long()[:, None]).flatten()
            for table, value in ((total, norms), (count, torch.ones_like(norms))):
                value = (value * (r.ids >= 0)).flatten().float()
                summed = torch.zeros(2 * arch.experts, device=value.device).scatter_add_(0, cell, value)
                table[r.layer] += summed.view(-1, 2).cpu()
    return {layer: total[layer] / count[layer].clamp(min=1) for layer in total}


def _routings(model: LabModel, make, mix: Mix, dtype: torch.dtype) -> list[Routing]:
    device = next(model.parameters()).device
    return model([as_batch(g.to(device)) for g in make.batch(mix)], dtype=dtype)[1]


def _rows(routing: Routing, experts: int) -> Tensor:
    return calibration.count_rows(routing.ids, (~routing.visual).long(), experts).cpu()


def expert_norms(model: LabModel, layer: int, hidden: Tensor, ids: Tensor) -> Tensor:
    """[T, K] f32: norm of what each chosen expert makes of the token; 0 for an empty slot."""
    experts = model.moe(layer).experts
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


def drift(model: LabModel, make, other, mix: Mix, dtype: torch.dtype) -> dict:
    """How alike profiles come out: of two halves, of unseen digits, and of shifted mixes."""
    recorded = record(model, other, mix, dtype)
    base = _profile(recorded)
    halves = [_profile(recorded.part(slice(i, None, 2))) for i in range(2)]
    found = {
        "experts": {s: sum(row.count(m) for row in base.modality.values()) for s, m in SIGNS.items()},
        "halves_agree": round(calibration.agreement(*halves), 4),
        "unseen_digits_agree": round(
            calibration.agreement(base, _profile(record(model, make, mix, dtype, seed=95_000))), 4
        ),
        "shares": {},
    }
    rows = recorded.rows.sum(0).double()  # [layers, E, 2]
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
    return calibration.make_profile(recording, "", "")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="digits")
    parser.add_argument("--checkpoint", type=Path, help="default: the suite's")
    parser.add_argument("--material", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    suite = SUITES[options.suite]
    folder = options.checkpoint or suite.checkpoint
    model = lab_checkpoint.load(folder, options.device)
    model.experts_by = "loop" if options.device == "cpu" else "dense"
    _, make = suite.makers(folder / "tokenizer.json", options.material)
    recording = record(model, make, suite.sample, torch.float32)
    fingerprint = calibration.routers(folder).fingerprint
    made = calibration.make_profile(recording, ARCHITECTURES[model.arch.family], fingerprint)
    profile.save(made, str(folder / "profile.json"))
    print({name: sum(row.count(m) for row in made.modality.values()) for name, m in SIGNS.items()})


if __name__ == "__main__":
    main()

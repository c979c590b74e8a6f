"""The calibration profile: which experts serve which modality, per layer, and for which model that was measured."""

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .errors import MacsError

SCHEMA = "sglang-macs/profile/2"
OLD_SCHEMA = "sglang-macs/profile/1"  # without evidence; still read


@dataclass(frozen=True)
class Evidence:
    """What a profile was made from, for readers; serving needs none of it.

    samples: how many; rows[layer] [E][2]: assignments by (visual, text); p_value[layer] [E]: of "serves both alike";
    fingerprint: sha256 of the routers' weights.
    """

    samples: int
    rows: dict[int, list[list[int]]]
    p_value: dict[int, list[float]]
    fingerprint: str


@dataclass(frozen=True)
class Profile:
    """`modality[layer]` is a list of E values in {-1, 0, +1}: text expert, shared, visual expert."""

    architecture: str
    num_experts: int
    modality: dict[int, list[int]]
    evidence: Evidence | None = None

    def of_layer(self, layer_id: int) -> Tensor:
        """[E] i8 of one layer. Raises MacsError if the profile does not hold that layer."""
        if layer_id not in self.modality:
            raise MacsError(
                "--macs-profile", f"no layer {layer_id}", "every MoE layer of the model", "Calibrate again."
            )
        return torch.tensor(self.modality[layer_id], dtype=torch.int8)

    def check_model(self, architecture: str, num_experts: int) -> None:
        """Raises MacsError if the profile was measured on another model."""
        if (self.architecture, self.num_experts) != (architecture, num_experts):
            raise MacsError(
                "--macs-profile",
                f"a profile of {self.architecture} with {self.num_experts} experts",
                f"one of {architecture} with {num_experts} experts",
                "Calibrate on the model that is served.",
            )


def load(path: str) -> Profile:
    """Reads and checks a profile. Raises MacsError for a missing, truncated or foreign file."""
    fix = "Write one with sglang-macs calibrate, or leave the flag out."
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
    except OSError as error:
        raise MacsError("--macs-profile", f"{path} ({error.strerror})", "a readable file", fix) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MacsError("--macs-profile", f"{path} (not JSON, or truncated: {error})", "a profile", fix) from error
    if not isinstance(raw, dict) or raw.get("schema") not in (SCHEMA, OLD_SCHEMA):
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise MacsError("--macs-profile", f"{path} with schema {found!r}", repr(SCHEMA), fix)
    try:
        experts = int(raw["num_experts"])
        modality = {int(layer): [int(m) for m in row] for layer, row in raw["modality"].items()}
        profile = Profile(str(raw["architecture"]), experts, modality, _evidence(raw.get("evidence")))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise MacsError("--macs-profile", f"{path} ({error!r})", "architecture, num_experts, modality", fix) from error
    for layer, row in modality.items():
        if len(row) != experts or not set(row) <= {-1, 0, 1}:
            raise MacsError("--macs-profile", f"layer {layer} of {path}", f"{experts} values in -1, 0, 1", fix)
    return profile


def _evidence(raw: dict | None) -> Evidence | None:
    if raw is None:
        return None
    rows = {int(layer): row for layer, row in raw["rows"].items()}
    p_value = {int(layer): row for layer, row in raw["p_value"].items()}
    return Evidence(int(raw["samples"]), rows, p_value, str(raw["fingerprint"]))


def save(profile: Profile, path: str) -> None:
    """Writes a profile that `load` reads back."""
    raw = {"schema": SCHEMA, "architecture": profile.architecture, "num_experts": profile.num_experts}
    raw["modality"] = {str(layer): row for layer, row in profile.modality.items()}
    if profile.evidence is not None:
        raw["evidence"] = asdict(profile.evidence)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(raw, file)

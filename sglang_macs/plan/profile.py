"""The calibration profile: which experts serve which modality, per layer, and for which model that was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .. import files
from ..errors import MacsError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "sglang-macs/profile/2"
OLD_SCHEMA = "sglang-macs/profile/1"  # without evidence; still read
MOST_EXPERTS = 1 << 16


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
        import torch  # a server has it; who only reads or writes profiles need not

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
        raw = json.loads(files.read(path, "--macs-profile", fix=fix))
    except (ValueError, RecursionError) as error:
        if isinstance(error, MacsError):
            raise
        raise MacsError("--macs-profile", f"{path} (not JSON, or truncated: {error})", "a profile", fix) from error
    if not isinstance(raw, dict) or raw.get("schema") not in (SCHEMA, OLD_SCHEMA):
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise MacsError("--macs-profile", f"{path} with schema {found!r}", repr(SCHEMA), fix)
    try:
        return _profile(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        expected = "architecture, num_experts, and -1, 0 or 1 for each expert of every layer"
        raise MacsError("--macs-profile", f"{path} ({error!r})", expected, fix) from error


def _profile(raw: dict) -> Profile:
    """Raises KeyError, TypeError, ValueError, AttributeError for what is none: JSON's types are taken as they are."""
    if not isinstance(raw["architecture"], str):
        raise TypeError(f"architecture {raw['architecture']!r}")
    experts = _whole(raw["num_experts"], 1, MOST_EXPERTS)
    modality = _by_layer(raw["modality"], experts, lambda m: _whole(m, -1, 1))
    if not modality:
        raise ValueError("no layers")
    return Profile(raw["architecture"], experts, modality, _evidence(raw.get("evidence"), experts))


def _evidence(raw: dict | None, experts: int) -> Evidence | None:
    if raw is None:
        return None
    rows = _by_layer(raw["rows"], experts, lambda pair: [_whole(n, 0, 2**63) for n in _row(pair, 2)])
    p_value = _by_layer(raw["p_value"], experts, _share)
    if not isinstance(raw["fingerprint"], str):
        raise TypeError(f"fingerprint {raw['fingerprint']!r}")
    return Evidence(_whole(raw["samples"], 0, 2**63), rows, p_value, raw["fingerprint"])


def _by_layer(raw: dict, experts: int, read: Callable[[object], object]) -> dict[int, list]:
    """{layer id: one value an expert}, each through `read`."""
    found = {}
    for layer, row in raw.items():
        if not (layer.isascii() and layer.isdecimal() and len(layer) < 6 and layer == str(int(layer))):
            raise ValueError(f"layer {layer!r}")
        found[int(layer)] = [read(value) for value in _row(row, experts)]
    return found


def _row(value: object, length: int) -> list:
    if not isinstance(value, list) or len(value) != length:
        raise ValueError(f"{len(value) if isinstance(value, list) else type(value).__name__}, not {length} values")
    return value


def _whole(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:  # True is an int, too
        raise ValueError(f"{value!r}, not a whole number from {low} to {high}")
    return value


def _share(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{value!r}, not 0 to 1")
    return value


def save(profile: Profile, path: str) -> None:
    """Writes a profile that `load` reads back, whole or not at all. Raises MacsError for one without layers."""
    if not profile.modality:
        raise MacsError("profile", "no layers", "every MoE layer of the model", "Calibrate again.")
    raw = {"schema": SCHEMA, "architecture": profile.architecture, "num_experts": profile.num_experts}
    raw["modality"] = {str(layer): row for layer, row in profile.modality.items()}
    if profile.evidence is not None:
        raw["evidence"] = asdict(profile.evidence)
    files.write(path, json.dumps(raw), "--out")

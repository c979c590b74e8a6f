"""The structure of csrc/include/macs/policy.h for ctypes, read from that file: an option is stated there alone."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from sglang_macs import choices  # needs neither torch nor the extension

ROOT = Path(__file__).resolve().parents[1]

NAMES = {
    "scope": choices.SCOPES,
    "load": choices.LOADS,
    "importance": choices.IMPORTANCES,
    "reroute": choices.REROUTES,
    "scoring": choices.SCORINGS,
}
_TYPES = {"bool": ctypes.c_bool, "float": ctypes.c_float, "double": ctypes.c_double}  # else of 32 bits
_HEADER = (ROOT / "csrc" / "include" / "macs" / "policy.h").read_text()


def strict(structure: type[ctypes.Structure]) -> type[ctypes.Structure]:
    """Refuses what it has no field for, which ctypes would make an attribute of Python's."""

    def set_field(self: ctypes.Structure, name: str, value: object) -> None:
        if name not in dict(self._fields_):
            raise AttributeError(f"{type(self).__name__} has no field {name}")
        ctypes.Structure.__setattr__(self, name, value)

    structure.__setattr__ = set_field
    return structure


@strict
class Policy(ctypes.Structure):
    """csrc/include/macs/policy.h."""

    _fields_ = [
        (name, _TYPES.get(kind, ctypes.c_int32)) for kind, name in re.findall(r"^  X\((\w+), (\w+)\)", _HEADER, re.M)
    ]


def policy(**options: object) -> Policy:
    """From options by their names, choices as strings; what is not given is 0."""
    return Policy(**{name: NAMES[name].index(value) if name in NAMES else value for name, value in options.items()})

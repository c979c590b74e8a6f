"""What csrc/include/macs states once and Python reads: the order of a policy's options, names of choices, limits."""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import torch

from .. import choices, extension
from ..errors import MacsError

FIX = "Build it: make build"


class Definitions(NamedTuple):
    """policy: kind of each option ("int", "bool", "float", "choice"), in the order in which they are packed. names: of
    the values of each choice. limits: by name.
    """

    policy: dict[str, str]
    names: dict[str, tuple[str, ...]]
    limits: dict[str, int]


@functools.cache
def read() -> Definitions:
    """Of the extension that is loaded. Raises MacsError for one that says nothing of them."""
    try:
        raw = json.loads(torch.ops.sglang_macs.definitions())
    except AttributeError as error:
        raise MacsError(extension.NAME, "one built from older sources", "this package's", FIX) from error
    return Definitions(raw["policy"], {k: tuple(v) for k, v in raw["names"].items()}, raw["limits"])


def limit(name: str) -> int:
    """One of the limits of csrc/include/macs."""
    return read().limits[name]


def check() -> None:
    """Raises MacsError where the extension was built from other sources than this package: flags must know their names
    without it (choices.py), and both must mean the same.
    """
    names, limits = read().names, read().limits
    here: dict[str, object] = {"scope": choices.SCOPES, "load": choices.LOADS, "importance": choices.IMPORTANCES}
    here |= {"reroute": choices.REROUTES, "scoring": choices.SCORINGS, "format": choices.FORMATS}
    here |= {"phase": choices.PHASES, "fault": choices.FAULTS}
    built: dict[str, object] = {**names, "weight_one": limits["weight_one"], "num_sums": limits["num_sums"]}
    built["buckets"] = (limits["min_buckets"], limits["max_buckets"])
    here |= {"weight_one": choices.WEIGHT_ONE, "num_sums": choices.NUM_SUMS}
    here["buckets"] = (choices.BUCKETS[0], choices.BUCKETS[-1])
    for name in here.keys() | built.keys():
        if here.get(name) != built.get(name):
            raise MacsError(extension.NAME, f"{name} {built.get(name)}", here.get(name), FIX)

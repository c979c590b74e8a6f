"""The options of a plan as the operators take them: a tuple of numbers, packed here, once a layer, in the order of
csrc/include/macs/policy.h.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ..choices import BUCKETS
from ..config import MacsConfig
from ..errors import MacsError
from . import definitions

Policy = tuple[float, ...]


def choice(name: str, value: object, choices: Sequence[object]) -> int:
    """Index of `value` in `choices`; MacsError names the field and what it takes."""
    if value not in choices:
        raise MacsError(name, repr(value), f"one of {', '.join(map(str, choices))}")
    return choices.index(value)


def pack(**options: Any) -> Policy:
    """Every option by its name in the C++ structure, but `buckets` for its `bucket_bits`; choices are strings. Raises
    MacsError for a choice that does not exist; the operators check numbers.
    """
    options["bucket_bits"] = choice("buckets", options.pop("buckets"), BUCKETS) + 1
    order, names = definitions.read().policy, definitions.read().names
    if differ := options.keys() ^ order.keys():
        raise MacsError("policy", f"{', '.join(sorted(differ))} missing or too many", "the options of macs/policy.h")
    return tuple(float(choice(name, options[name], names[name]) if name in names else options[name]) for name in order)


def of_config(config: MacsConfig, **others: Any) -> Policy:
    """What `config` says, and `others`: what the model and its group say, or what wins over the config."""
    own = {name: getattr(config, name) for name in definitions.read().policy if hasattr(config, name)}
    return pack(**own | {"buckets": config.buckets} | others)


def unpack(packed: list[float], num_physical: int = 0) -> SimpleNamespace:
    """For operators in Python: the options by their names, choices as the indexes that kernels compare, and `buckets`.
    With places, `num_physical` experts are what divides among the ranks. Raises ValueError as the operators in C++ do.
    """
    return _unpacked(tuple(packed), num_physical)


@functools.lru_cache
def _unpacked(packed: Policy, num_physical: int) -> SimpleNamespace:
    torch.ops.sglang_macs.check_policy(packed, num_physical)
    kinds = {"int": int, "bool": bool, "float": float, "choice": int}
    named = zip(definitions.read().policy.items(), packed, strict=True)
    policy = SimpleNamespace(**{name: kinds[kind](value) for (name, kind), value in named})
    policy.buckets = BUCKETS[policy.bucket_bits - 1]
    return policy

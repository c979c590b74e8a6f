"""An importance of one's own, `--macs-importance MODULE:FUNCTION`: what is clipped last is what a Python function
scores highest (docs/guide/importance.md).

The function's numbers become buckets, and from there on everything is the operators', in integers. So bounds hold and
ranks agree whatever it returns; it may even differ between ranks.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import MacsError
from .tokens import RoutedTokens

Importance = Callable[[RoutedTokens], Tensor]
FLAG = "--macs-importance"


def check(name: str) -> None:
    """Raises MacsError where there is no such module. Does not run it: a launcher stays free of what it imports."""
    module = name.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # of the package that it lies in
        found = None
    if found is None:
        raise MacsError(FLAG, f"no module {module}", "one on PYTHONPATH or in the current folder", "")


def load(name: str) -> Importance:
    """The function that MODULE:FUNCTION names. Raises MacsError where it cannot be had."""
    check(name)
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        why = f"{type(error).__name__} ({error}) on importing {module}"
        raise MacsError(FLAG, why, "a module that imports", "") from error
    if not callable(found):
        raise MacsError(FLAG, f"no function {function} in {module}", "one that takes RoutedTokens", "")
    return found


def scores(importance: Importance, tokens: RoutedTokens) -> Tensor:
    """[T, K] f32 of the assignments, from [T, K] or, the same for all of a token's, [T]. Not called without tokens.
    Raises MacsError for anything else.
    """
    ids = tokens.topk_ids
    if len(ids) == 0:
        return torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    values: Any = importance(tokens)
    fits = isinstance(values, Tensor) and values.device == ids.device and values.is_floating_point()
    if not fits or values.shape not in (ids.shape, ids.shape[:1]):
        expected = f"floating-point numbers [{ids.shape[0]}, {ids.shape[1]}] or [{ids.shape[0]}] on {ids.device}"
        raise MacsError(FLAG, _shown(values), expected, "")
    values = values.detach().float()
    return values.reshape(len(ids), -1).expand(ids.shape).contiguous()


def _shown(values: object) -> str:
    if not isinstance(values, Tensor):
        return type(values).__name__
    return f"{values.dtype} {list(values.shape)} on {values.device}"


def below_highest(buckets: int) -> float:
    """The greatest importance that is not in the highest bucket (docs/design/method.md, 3)."""
    bits = (buckets // 16).bit_length() - 1
    greatest = (((127 << bits) - 1) << (23 - bits)) - 1
    return torch.tensor(greatest, dtype=torch.int32).view(torch.float32).item()


def gates(tokens: RoutedTokens, topk_ids: Tensor, scoring: str) -> Tensor:
    """[T, K] f32 of what is dispatched (docs/design/method.md 5.3): an assignment that stays keeps its gate, one that
    is re-routed gets its router probability under the scaling of the token's greatest gate, a dropped one 0.
    """
    kept = tokens.topk_weights
    if tokens.router_logits is None or kept.numel() == 0:
        return kept.masked_fill(topk_ids < 0, 0.0)
    score = _log_scores(tokens.router_logits.float(), scoring)
    greatest = kept.masked_fill(tokens.topk_ids < 0, -torch.inf).argmax(dim=1, keepdim=True)
    reference = score.gather(1, tokens.topk_ids.gather(1, greatest).clamp(min=0).long())
    chosen = score.gather(1, topk_ids.clamp(min=0).long())
    gate = kept.gather(1, greatest)
    moved = torch.where(gate == 0, gate, gate * (chosen - reference).exp())
    return torch.where(topk_ids == tokens.topk_ids, kept, moved).masked_fill(topk_ids < 0, 0.0)


def _log_scores(logits: Tensor, scoring: str) -> Tensor:
    """Logarithms of a router's scores, up to a number for each token."""
    if scoring == "softmax":
        return logits
    if scoring == "sigmoid":
        return functional.logsigmoid(logits)
    return functional.softplus(logits).log() / 2

"""What a kernel wrote against what it should have: the first wrong coordinate, and references in float64."""

from __future__ import annotations

import numpy as np
import torch

from .kernel_case import Config

ENTROPY_ATOL, WEIGHT_RTOL = 2e-5, 2e-5


class Mismatch(AssertionError):
    """The first wrong coordinate with both values."""


def expect(name: str, config: Config, got: np.ndarray, want: np.ndarray, rtol: float = 0.0, atol: float = 0.0) -> None:
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise Mismatch(f"{name}: shape {got.shape}, expected {want.shape}; {config}")
    exact = rtol == atol == 0.0
    good = got == want if exact else np.abs(got.astype(np.float64) - want) <= atol + rtol * np.abs(want)
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise Mismatch(f"{name}{list(at)}: got {got[at]!r}, expected {want[at]!r}, {(~good).sum()} wrong; {config}")


def entropy_f64(hidden: torch.Tensor, segment: np.ndarray) -> np.ndarray:
    out = np.zeros(len(segment))
    for first in range(0, len(segment), 4096):
        x = hidden[first : first + 4096].double()
        log_p = torch.log_softmax(x, 1)
        out[first : first + 4096] = -(log_p.exp() * log_p).sum(1).cpu().numpy()
    return np.where(segment >= 0, out, 0.0)


def weight_f64(entropy: np.ndarray, segment: np.ndarray, num_segments: int, delta: float) -> np.ndarray:
    weight = np.ones(len(entropy))
    for s in range(num_segments):
        x = entropy[segment == s].astype(np.float64)
        if len(x):
            weight[segment == s] = 1 / (1 + np.exp(delta * (x - x.mean()) / (x.std() + 1e-6)))
    return weight

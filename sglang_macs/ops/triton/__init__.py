"""The operators in Triton, for GPUs where the extension was built without CUDA (docs/design/method.md).

Each takes the arguments of its schema in csrc/torch and gives the bits of the CPU operator where they are
integers. They never make the host wait, launch the same kernels whatever the values are, and use only integer atomics,
so that they can be captured in a graph and repeat bit for bit.
"""

import functools
import warnings
from collections.abc import Callable

import torch

from .apply import clip_apply
from .balance import replica_balance
from .choose import replica_choose
from .entropy import entropy_score, entropy_weight
from .histogram import load_histogram
from .selection import selection_score
from .threshold import clip_threshold

OPERATORS = (
    entropy_score, entropy_weight, load_histogram, clip_threshold, replica_balance, replica_choose, selection_score,
    clip_apply,
)  # fmt: skip


def _on_its_device(operator: Callable) -> Callable:
    """Triton launches on the current device, which need not be the tensors'."""

    @functools.wraps(operator)
    def call(*args):
        with torch.cuda.device_of(args[0]):
            return operator(*args)

    return call


def register(device: str) -> torch.library.Library:
    """Makes these the operators' implementation for "CUDA" (or, under Triton's interpreter, "CPU").

    The registration ends with the returned object.
    """
    library = torch.library.Library("sglang_macs", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it takes the place of the extension's is the point
        for operator in OPERATORS:
            library.impl(operator.__name__, _on_its_device(operator), device)
    return library

"""The extension that holds the operators, loaded, and whose kernels CUDA tensors get."""

import importlib.util
import os

import torch
from torch import Tensor

from .. import extension
from ..errors import MacsError
from . import definitions


def _load_library() -> None:
    """Registers the operators of the extension. Raises MacsError."""
    library = extension.library_in(extension.PACKAGE)
    if library is None:
        raise extension.missing(extension.PACKAGE)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # built against another torch
        why = str(error).strip().splitlines()[-1]
        raise MacsError(
            extension.NAME, why, f"a build for torch {torch.__version__}", "Build it: make build"
        ) from error


def _choose_cuda_backend() -> str | None:
    built = torch._C._dispatch_has_kernel_for_dispatch_key("sglang_macs::clip_apply", "CUDA")
    usual = "cuda" if built else "triton" if torch.version.cuda and importlib.util.find_spec("triton") else None
    backend = os.environ.get("MACS_CUDA_BACKEND") or usual
    if backend == "cuda" and not built:
        raise MacsError("MACS_CUDA_BACKEND", "cuda", "triton: this build has no CUDA kernels", "Or build with nvcc.")
    if backend not in ("cuda", "triton", None):
        raise MacsError("MACS_CUDA_BACKEND", backend, "cuda or triton")
    return backend


class _Unavailable:
    """In place of the operators that could not be loaded: the first use of one says why."""

    def __init__(self, why: MacsError) -> None:
        self.why = why

    def __getattr__(self, operator: str):
        raise self.why


# An exception here would reach SGLang's loader of plugins, which swallows it, and the launch would end with a usage
# message that does not know `macs`. So it is kept, and raised by `check` and by every operator.
_cuda_backend: str | None = None
try:
    _load_library()
    definitions.check()
    _cuda_backend = _choose_cuda_backend()
    loaded = torch.ops.sglang_macs
except MacsError as error:
    loaded = _Unavailable(error)

if _cuda_backend == "triton":
    from . import triton as triton_ops

    _triton_library = triton_ops.register("CUDA")


def check() -> None:
    """Raises the MacsError that kept the operators from being loaded, if one did."""
    if isinstance(loaded, _Unavailable):
        raise loaded.why


def cuda_backend() -> str | None:
    """Whose operators CUDA tensors get: "cuda" (the extension's kernels), "triton" or None. Raises as `check`."""
    check()
    return _cuda_backend


def has_cuda() -> bool:
    """Whether the operators take CUDA tensors. Raises as `check`."""
    return cuda_backend() is not None


def is_whole(tensor: Tensor) -> bool:
    """Whether `plan`, `score_histogram` and `threshold_apply` exist where `tensor` is: not in Triton."""
    return not tensor.is_cuda or _cuda_backend == "cuda"

"""Builds csrc/cuda with nvcc into one library with a C interface, and calls it through ctypes on torch tensors.

Needs neither the extension nor torch's headers, so the kernels can be checked and timed alone.
`python -m reference.kernels_c` only builds (no GPU needed).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import fused_c
from .policy_c import NAMES, Policy, policy, strict

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "kernels"
FLAGS = ["-O3", "-std=c++20", "-gencode=arch=compute_90a,code=sm_90a", "-lineinfo", "-DMACS_C_API=1"]

__all__ = ["NAMES", "Policy", "policy"]  # of policy_c, for those that fill these structures

SCOPES, LOADS, IMPORTANCES, REROUTES, SCORINGS = NAMES.values()
DTYPES = ("float32", "float16", "bfloat16")

_p, _i64, _i32, _f32, _bool = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_bool


def _struct(name: str, fields: list[tuple[str, type]]) -> type[ctypes.Structure]:
    return strict(type(name, (ctypes.Structure,), {"_fields_": fields}))


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


# The structures of csrc/include/macs/params.h, field by field; macs_sizeof checks the layout.
EntropyScoreParams = _struct(
    "EntropyScoreParams",
    [*_fields(_p, "hidden_states", "segment", "entropy"), *_fields(_i64, "num_tokens", "hidden_size"), ("dtype", _i32)],
)
EntropyWeightParams = _struct(
    "EntropyWeightParams",
    [*_fields(_p, "entropy", "segment", "weight"), *_fields(_i64, "num_tokens", "num_segments"), ("delta", _f32)],
)
Assignments = _struct(
    "Assignments",
    [
        *_fields(_p, "topk_ids", "topk_weights", "weight", "segment"),
        *[("num_tokens", _i64), ("top_k", _i32), ("ids_are_i64", _bool), ("policy", Policy)],
    ],
)
LoadHistogramParams = _struct("LoadHistogramParams", [("assignments", Assignments), ("histogram", _p)])
ClipThresholdParams = _struct(
    "ClipThresholdParams",
    [*_fields(_p, "own", "group", "modality", "shift", "cut"), ("policy", Policy)],
)
ClipApplyParams = _struct(
    "ClipApplyParams",
    [
        ("assignments", Assignments),
        *_fields(_p, "router_logits", "shift", "cut", "new_ids", "new_weights", "counts"),
        ("logits_dtype", _i32),
        ("selection", _p),
    ],
)
SelectionScoreParams = _struct(
    "SelectionScoreParams",
    [
        *_fields(_p, "router_logits", "correction_bias", "selection"),
        ("num_tokens", _i64),
        *_fields(_i32, "num_experts", "num_groups", "topk_groups", "scoring", "logits_dtype"),
    ],
)
Places = _struct("Places", [("table", _p), *_fields(_i32, "num_experts", "num_physical", "num_ranks")])  # replicas.h
_STRUCTS = [EntropyScoreParams, EntropyWeightParams, LoadHistogramParams, ClipThresholdParams, ClipApplyParams]
_STRUCTS += [SelectionScoreParams]


def _sources(flags: list[str]) -> tuple[list[Path], str]:
    files = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    every = [*files, *(ROOT / "csrc" / "cuda").glob("*.cuh"), *(ROOT / "csrc" / "include" / "macs").glob("*.*h")]
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sorted(every):
        digest.update(path.read_bytes())
    return files, digest.hexdigest()


def build(jobs: int, macros: tuple[str, ...] = ()) -> Path:
    """The library with `macros` (NAME=VALUE) defined, compiled only if a source or a flag changed since."""
    flags = [*FLAGS, *(f"-D{macro}" for macro in macros)]
    files, digest = _sources(flags)
    folder = BUILD.joinpath(*macros)
    library, stamp = folder / "libmacs_kernels.so", folder / "digest"
    if library.exists() and stamp.exists() and stamp.read_text() == digest:
        return library
    folder.mkdir(parents=True, exist_ok=True)
    include = f"-I{ROOT / 'csrc' / 'include'}"

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = ["nvcc", *flags, "-Xptxas", "-v", "-Xcompiler", "-fPIC", include]
        command += ["-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (folder / f"{source.stem}.log").write_text(done.stdout + done.stderr)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stdout}{done.stderr}")
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = [str(path) for path in pool.map(compile_one, files)]
    subprocess.run(["nvcc", "-shared", "-o", str(library), *objects], check=True)
    stamp.write_text(digest)
    return library


class Kernels:
    """The launchers; every method checks the answer."""

    def __init__(self, macros: tuple[str, ...] = ()) -> None:
        self.library = ctypes.CDLL(str(build(os.cpu_count() or 1, macros)))
        self.library.macs_sizeof.restype = ctypes.c_size_t
        self.library.macs_plan_workspace_bytes.restype = ctypes.c_size_t
        fused_c.check_sizes(self.library)
        for i, struct in enumerate(_STRUCTS):
            size = self.library.macs_sizeof(i)
            if size != ctypes.sizeof(struct):
                raise RuntimeError(f"{struct.__name__}: {size} bytes in C, {ctypes.sizeof(struct)} here")

    def __call__(self, name: str, *args: object) -> None:
        """Launch `name` with structures by pointer and integers as addresses, on torch's current stream."""
        import torch

        passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else _p(a) for a in args]
        error = getattr(self.library, f"macs_{name}")(*passed, _p(torch.cuda.current_stream().cuda_stream))
        if error != 0:
            raise RuntimeError(f"macs_{name}: CUDA error {error}")

    def plan_workspace_bytes(self, weight: ctypes.Structure, apply: ctypes.Structure) -> int:
        """Enough for every launcher: the plan's scratch holds the operators' own."""
        return self.library.macs_plan_workspace_bytes(ctypes.byref(weight), ctypes.byref(apply))


if __name__ == "__main__":
    print(build(int(sys.argv[1]) if len(sys.argv) > 1 else 1))

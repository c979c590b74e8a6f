"""CUDA MPS: several processes on one GPU at the same time, each held to its share of the SMs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator

NCCL = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}  # several ranks on one GPU, from 2.30 on


@contextlib.contextmanager
def shared_gpu(processes: int) -> Iterator[dict[str, str]]:
    """Runs an MPS daemon of its own; yields the environment that makes `processes` processes its clients: all that live
    at the same time, for they share the SMs out among them.

    The daemon has the first GPU that is visible here, and its clients count from there. Some SMs are left
    over: shares that need all of them may overlap. NCCL takes several ranks of its clients.
    """
    with tempfile.TemporaryDirectory() as folder:
        mps = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        first = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env={**os.environ, **mps, **first}, check=True)
        try:
            share = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(96 // processes)}
            yield mps | share | NCCL | {"CUDA_VISIBLE_DEVICES": "0"}
        finally:
            command = ["nvidia-cuda-mps-control"]
            subprocess.run(command, input="quit -t 1\n", text=True, env={**os.environ, **mps}, check=False, timeout=30)

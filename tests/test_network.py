"""The network policy of the fused dispatch compiles, where there is a compiler and NCCL's headers for it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ROOT / "build" / "nccl" / "nvidia" / "nccl" / "include"
NVCC = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")


@pytest.mark.skipif(not os.access(NVCC, os.X_OK), reason="no nvcc")
@pytest.mark.skipif(not (HEADERS / "nccl_device.h").exists(), reason="no NCCL headers: make check-network fetches them")
def test_compiles_over_gin():
    done = subprocess.run(["bash", "scripts/check_network.sh", str(HEADERS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "build" / "fused_dispatch_gin.o").stat().st_size > 0


def test_missing_headers_are_named(tmp_path):
    if not os.access(NVCC, os.X_OK):
        pytest.skip("no nvcc")
    done = subprocess.run(["bash", "scripts/check_network.sh", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"no nccl_device.h in {tmp_path}" in done.stdout

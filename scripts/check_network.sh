#!/usr/bin/env bash
# Compiles the fused dispatch over NCCL's GIN against the headers of the pinned NCCL: it has no GPU to run on, and must not rot.
#
#   scripts/check_network.sh [INCLUDE]     INCLUDE: the folder of nccl_device.h; default: taken from the NCCL wheel (200 MB)
set -euo pipefail
cd "$(dirname "$0")/.."
NCCL=2.30.7  # what sglang's CUDA stack pins
PY=${PY:-.venv/bin/python}
nvcc=$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
[ -x "$nvcc" ] || { echo "check-network: no nvcc. Install the CUDA toolkit 13.0, or set CUDA_HOME."; exit 1; }
include=${1:-build/nccl/nvidia/nccl/include}
if [ ! -e "$include/nccl_device.h" ]; then
    [ $# = 0 ] || { echo "check-network: no nccl_device.h in $include. Give the include folder of NCCL $NCCL."; exit 1; }
    echo "fetching nvidia-nccl-cu13 $NCCL for its headers"
    "$PY" -m pip download --quiet --disable-pip-version-check --no-deps --dest build/nccl "nvidia-nccl-cu13==$NCCL"
    "$PY" -m zipfile -e build/nccl/nvidia_nccl_cu13-"$NCCL"*.whl build/nccl
    rm -f build/nccl/*.whl
fi
mkdir -p build
echo "compiling csrc/network/fused_dispatch_gin.cu (about a minute)"
"$nvcc" -gencode=arch=compute_90a,code=sm_90a -std=c++20 -O1 -I csrc/include -I csrc/cuda -I "$include" \
    -c csrc/network/fused_dispatch_gin.cu -o build/fused_dispatch_gin.o
echo "check-network: the fused dispatch compiles over NCCL $NCCL's GIN (not run)"

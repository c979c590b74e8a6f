"""What instructions cost that run once: straight-line code by its size, cold and warm, and jumps through it.

    python3 -m benchmarks.gpu.time_instructions --out FILE --commit ID

A kernel runs the same straight code five times and reads the clock in between. `hops`: its first pass only jumps from
one stretch of 32 instructions to the next. `cold`: 300 MB were written before the launch, so that the L2 holds none of
the code; what lies nearer to the SMs stays.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import result_file
from benchmarks.gpu.time_kernels import COLD_BYTES
from reference.kernels_c import FLAGS

SIZES = (512, 1024, 2048, 4096, 8192, 16384)  # instructions of 16 bytes
STRETCH = 32  # instructions between two jumps
PASSES, LAUNCHES = 5, 5
SHAPES = ((1, 1), (132, 1), (132, 4), (132, 16))  # blocks, warps of each
OPERATIONS = ("add.u32 %0, %0, %1;", "add.u32 %2, %2, %3;", "xor.b32 %1, %1, %0;", "xor.b32 %3, %3, %2;")


def straight(size: int) -> str:
    """PTX of `size` instructions; a jump over each stretch where operand 4 is not 0."""
    lines = ["{ .reg .pred p; setp.ne.u32 p, %4, 0;"]
    for i in range(size):
        if i % STRETCH == 0:
            lines.append(f"at{size}_{i // STRETCH}: @p bra at{size}_{i // STRETCH + 1};")
        lines.append(OPERATIONS[i % len(OPERATIONS)])
    return "\\n".join([*lines, f"at{size}_{-(-size // STRETCH)}: }}"])


def kernel(size: int) -> str:
    return f"""
__global__ void straight_{size}(uint32_t x, bool hops, long long* cycles) {{
  uint32_t a = threadIdx.x, b = x, c = x + 1, d = threadIdx.x * 3;
#pragma unroll 1
  for (int pass = 0; pass < {PASSES}; ++pass) {{
    const uint32_t skip = pass == 0 && hops ? 1 : 0;
    const long long start = clock64();
    asm volatile("{straight(size)}" : "+r"(a), "+r"(b), "+r"(c), "+r"(d) : "r"(skip) : "memory");
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0) cycles[warp * {PASSES} + pass] = clock64() - start;
  }}
  if (a + b + c + d == 12345) cycles[0] = 1;
}}
extern "C" int run_{size}(int blocks, int threads, bool hops, long long* cycles) {{
  straight_{size}<<<blocks, threads>>>(7, hops, cycles);
  return cudaDeviceSynchronize();
}}"""


def build(folder: Path) -> ctypes.CDLL:
    source, library = folder / "straight.cu", folder / "straight.so"
    source.write_text("\n".join(["#include <cuda_runtime.h>", "#include <cstdint>", *map(kernel, SIZES)]))
    subprocess.run(["nvcc", *FLAGS, "-Xcompiler", "-fPIC", "-shared", "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def passes(library: ctypes.CDLL, size: int, shape: tuple[int, int], hops: bool, cold: bool) -> list[float]:
    """Cycles of each pass: the median over launches of the median warp."""
    blocks, warps = shape
    cycles = torch.zeros(blocks * warps, PASSES, dtype=torch.int64, device="cuda")
    flush = torch.empty(COLD_BYTES // 4, device="cuda")
    taken = []
    for _ in range(LAUNCHES):
        if cold:
            flush.fill_(1.0)
        torch.cuda.synchronize()
        error = getattr(library, f"run_{size}")(blocks, warps * 32, hops, ctypes.c_void_p(cycles.data_ptr()))
        if error != 0:
            raise RuntimeError(f"straight_{size}: CUDA error {error}")
        taken.append(cycles.double().median(0).values)
    return torch.stack(taken).median(0).values.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        for size in SIZES:
            for shape in SHAPES:
                for hops in (False, True):
                    for cold in (True, False):
                        found = passes(library, size, shape, hops, cold)
                        case = {"instructions": size, "blocks": shape[0], "warps": shape[1], "hops": hops, "cold": cold}
                        rows.append({"case": case, "cycles": [round(x) for x in found]})
                        print(f"{case}: {' '.join(f'{x / size:.2f}' for x in found)} cycles an instruction")
    result_file.write(options.out, rows, commit=options.commit)


if __name__ == "__main__":
    main()

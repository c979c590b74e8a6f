"""The plan with and without each compile-time switch of the kernels, in one process: same bits, and how fast.

    python3 -m benchmarks.gpu.time_variants --out FILE --macros MACS_NEW_WAY=0 ...

A switch lives while two versions stand against each other: `#ifndef MACS_NEW_WAY`, `#define MACS_NEW_WAY 1`. Each
variant is a library of its own (kernels_c.build). They take turns, the unchanged kernels with them, so that two
rows of the same variant say what is noise.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks.gpu import result_file
from benchmarks.gpu.time_kernels import HOT, graph_us
from reference import kernels_c as c
from reference.kernel_case import Config, Run, make_inputs

TURNS = 3
CASES = [
    Config(T=32, hot=HOT), Config(T=128, hot=HOT), Config(T=128, H=7168, hot=HOT), Config(T=256, hot=HOT),
    Config(T=512, hot=HOT), Config(T=1024, hot=HOT), Config(T=8192, hot=HOT), Config(T=8192, hot=1.0),
    Config(T=8192, hot=HOT, scope="expert", load="effective", reroute="local"), Config(T=65536, hot=HOT),
]  # fmt: skip
COLD_BYTES = 300_000_000  # inputs of one graph, several times the L2


def runs_of(kernels: c.Kernels, config: Config) -> list[Run]:
    """Runs over different inputs, the same for every variant."""
    count = max(1, min(64, -(-COLD_BYTES // (config.T * config.H * 2))))
    return [Run(kernels, config, make_inputs(config, 7 + i, "cuda")) for i in range(count)]


def measure(config: Config, libraries: dict[str, c.Kernels]) -> list[dict]:
    """One row per variant: median of its turns, turns of the plan and its halves, whether its bits are the first's."""
    runs = {name: runs_of(kernels, config) for name, kernels in libraries.items()}
    outputs = {}
    for name, of_variant in runs.items():
        of_variant[0].poison()
        of_variant[0].fused()
        outputs[name] = of_variant[0].outputs()
    first = next(iter(outputs.values()))
    times: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for _ in range(TURNS):
        for name, of_variant in runs.items():
            for step in ("fused", "score_histogram", "threshold_apply"):
                median, _ = graph_us([getattr(run, step) for run in of_variant])
                times[name].setdefault(step, []).append(round(median, 3))
    return [
        {
            "op": "plan",
            "case": {**config.sizes(), "variant": name},
            "median_us": float(np.median(times[name]["fused"])),
            "turns_us": times[name],
            "same_bits": all(np.array_equal(first[key], value) for key, value in outputs[name].items()),
        }
        for name in runs
    ]


def show(row: dict) -> None:
    case, turns = row["case"], row["turns_us"]
    halves = [float(np.median(turns[step])) for step in ("score_histogram", "threshold_apply")]
    print(
        f"T={case['T']:<6d} H={case['H']:<5d} {case['scope']:6s} hot {case['hot']:<4} {case['variant']:22s} "
        f"{row['median_us']:7.2f} us ({min(turns['fused']):.2f} to {max(turns['fused']):.2f}); "
        f"halves {halves[0]:.2f} + {halves[1]:.2f}" + ("" if row["same_bits"] else "  OTHER BITS"),
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser, required=False)
    parser.add_argument("--macros", nargs="*", default=[], metavar="NAME=VALUE", help="each makes a variant")
    parser.add_argument("--build-only", action="store_true", help="compile all variants and end (no GPU needed)")
    options = parser.parse_args()
    variants = {"as is": (), **{macro: (macro,) for macro in options.macros}}
    with ThreadPoolExecutor(len(variants)) as pool:
        jobs = max(1, (os.cpu_count() or 1) // len(variants))
        list(pool.map(lambda macros: c.build(jobs, macros), variants.values()))
    if options.build_only:
        return 0
    if options.out is None:
        parser.error("--out is needed")
    libraries = {name: c.Kernels(macros) for name, macros in variants.items()}
    rows = []
    for config in CASES:
        rows += measure(config, libraries)
        for row in rows[-len(variants) :]:
            show(row)
        torch.cuda.empty_cache()
        result_file.write(options.out, rows, commit=options.commit)
    wrong = [row["case"] for row in rows if not row["same_bits"]]
    print(f"time_variants: {'OTHER BITS in ' + str(wrong) if wrong else 'all variants give the same bits'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

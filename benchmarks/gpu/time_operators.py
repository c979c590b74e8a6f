"""Times of the operators that CUDA tensors get (`ops.cuda_backend`), by CUDA graph replay and launched one by one.

The case is that of docs/results/kernels.md. `MACS_CUDA_BACKEND=triton python3 -m benchmarks.gpu.time_operators --out
FILE` for Triton's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from benchmarks.gpu import result_file
from benchmarks.gpu.time_kernels import HOT, graph_us
from reference.kernel_case import Config, make_inputs
from sglang_macs import ops
from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens


def host_us(step: Callable[[], object], repeats: int = 50) -> float:
    """Microseconds of host time that launching a step takes, nothing in its way."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent * 1e6 / repeats


def steps(config: Config) -> dict[str, Callable[[], object]]:
    """The plan and its parts, each on the results of the part before."""
    raw = make_inputs(config, 7, "cuda")
    ids, gates, logits, segment = (torch.from_numpy(x).cuda() for x in (raw.ids, raw.gates, raw.logits, raw.segment))
    plan = Plan(
        MacsConfig.from_preset("rank", gamma=config.gamma), config.E, config.R, torch.from_numpy(raw.modality).cuda()
    )
    entropy = ops.entropy_score(raw.hidden, segment)
    weight = ops.entropy_weight(entropy, segment, 1, config.delta)
    own = plan.histogram(ids, gates, weight, segment)
    shift, cut = plan.threshold(own, own)
    return {
        "entropy_score": lambda: ops.entropy_score(raw.hidden, segment),
        "entropy_weight": lambda: ops.entropy_weight(entropy, segment, 1, config.delta),
        "load_histogram": lambda: plan.histogram(ids, gates, weight, segment),
        "clip_threshold": lambda: plan.threshold(own, own),
        "clip_apply": lambda: plan.apply(ids, gates, weight, segment, logits, shift, cut),
        "plan": lambda: plan(RoutedTokens(raw.hidden, ids, gates, logits, segment, 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser)
    options = parser.parse_args()
    rows = []
    for tokens in (128, 1024, 8192, 65536):
        for name, step in steps(Config(T=tokens, hot=HOT)).items():
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            first = time.perf_counter() - start  # compilation included, where the kernel is new
            median, p99 = graph_us([step])
            rows.append({"op": name, "T": tokens, "median_us": round(median, 2), "p99_us": round(p99, 2),
                         "host_us": round(host_us(step), 1), "first_ms": round(first * 1e3, 1)})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    result_file.write(options.out, rows, commit=options.commit, backend=ops.cuda_backend())


if __name__ == "__main__":
    main()

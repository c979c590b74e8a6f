"""Build the CUDA kernels, check the fused dispatch and combine, and time them.

    python3 -m benchmarks.gpu.check_fused --out FILE                     one GPU: 1, 2 and 8 ranks that share it
    python3 -m benchmarks.gpu.check_fused --out FILE --processes 2       a process a rank, a GPU each, over NVLink
    python3 -m benchmarks.gpu.check_fused --out FILE --processes 8 --mps the same on one GPU
    compute-sanitizer python3 -m benchmarks.gpu.check_fused --sanitize   few and small cases, nothing timed

Decisions, places, rows and scales are compared to the bit with a reference written from docs/design/method.md, in a
captured graph with the composed path; sums are close. Outputs are poisoned before every round, and so is what lies
beside them. DeepEP is timed in the same run where it is installed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from dataclasses import replace

import numpy as np
import torch

from benchmarks.gpu import fused_processes, fused_rounds, result_file, time_decode, time_fused
from reference import fused_cases, fused_faults
from reference import kernels_c as c
from reference.comparison import Mismatch
from reference.fused_case import FusedConfig, Group, masked
from reference.fused_checks import play
from reference.kernel_case import Config

GRAPH_ROUNDS = 1000
FAULT_TIMEOUT_NS = 5_000_000


def check_cases(kernels: c.Kernels, configs: list[FusedConfig], seed: int, rounds: int) -> int:
    """Failures among the configs, going on after each: the list says more than the first one."""
    failed = 0
    for config in configs:
        group = Group(kernels, config)
        try:
            for step in range(rounds):
                play(group, seed + step)
        except Mismatch as error:
            print(error, flush=True)
            failed += 1
        del group
    print(f"{len(configs) - failed} of {len(configs)} cases agree, {rounds} rounds each, seed {seed}", flush=True)
    return failed


def check_faults(kernels: c.Kernels, scenarios: dict[str, fused_faults.Scenario]) -> int:
    failed = 0
    pairs = fused_faults.PAIRS
    for (kind, pair), (name, scenario) in itertools.product(pairs.items(), scenarios.items()):
        try:
            fused_faults.check_fault(kernels, "cuda", scenario, FAULT_TIMEOUT_NS, pair)
        except Mismatch as error:
            print(f"fault '{name}{kind}': {error}", flush=True)
            failed += 1
    total = len(pairs) * len(scenarios)
    print(f"{total - failed} of {total} faults are named, and the next round works", flush=True)
    return failed


def graph_configs(num_sms: int) -> list[tuple[FusedConfig, int]]:
    """Groups and how many rounds they play in a graph."""

    def shared(ranks: int, **options) -> FusedConfig:
        tokens = options.pop("T", 128)
        own = {name: options.pop(name) for name in ("format", "scales_with_rows", "carried") if name in options}
        plan = Config(T=tokens, R=ranks, hot=1.0, visual=0.9, **options)
        return FusedConfig(plan, (tokens,) * ranks, num_sms // ranks, alignment=8, **own)

    expert = {"scope": "expert", "load": "effective", "importance": "entropy", "reroute": "local", "gamma": 0.8}
    return [
        (shared(8), GRAPH_ROUNDS),
        (shared(2, T=127, **expert), GRAPH_ROUNDS // 4),
        (masked(shared(2, format="fp8", scales_with_rows=True)), GRAPH_ROUNDS // 4),
        (masked(shared(1, scope="expert", bucket_bits=4)), GRAPH_ROUNDS // 4),
        (masked(shared(8, carried=True)), GRAPH_ROUNDS),
        (masked(shared(2, T=32, format="fp8", scales_with_rows=True, carried=True)), GRAPH_ROUNDS),
    ]


def check_graphs(kernels: c.Kernels, configs: list[tuple[FusedConfig, int]], seed: int) -> int:
    failed = 0
    for config, rounds in configs:
        try:
            print(f"R {config.plan.R}: {fused_rounds.check(kernels, config, rounds, seed)}", flush=True)
        except Mismatch as error:
            print(error, flush=True)
            failed += 1
        torch.cuda.empty_cache()
    return failed


def check_all(kernels: c.Kernels, options: argparse.Namespace, num_sms: int) -> int:
    """Number of failures of one GPU's checks."""
    if options.sanitize:
        small = FusedConfig(Config(T=9, R=2, E=16, hot=3.0, gamma=0.7), (9, 5), 4, row_experts=True)
        with_rows = replace(small, format="fp8", scales_with_rows=True)
        configs = [
            small,
            masked(small),
            with_rows,
            masked(with_rows),
            masked(replace(small, row_experts=False, carried=True)),
            masked(replace(with_rows, carried=True)),
            *fused_cases.random_configs(options.small, options.seed, 16),
        ]
        few = {name: fused_faults.SCENARIOS[name] for name in ("dead rank", "13 tokens", "13 rows of an expert")}
        return check_cases(kernels, configs, options.seed, 1) + check_faults(kernels, few)
    configs = fused_cases.named(num_sms)
    configs += fused_cases.random_configs(options.small, options.seed, num_sms)
    failed = check_faults(kernels, fused_faults.SCENARIOS)
    failed += stage("graphs", lambda: check_graphs(kernels, graph_configs(num_sms), options.seed))
    return failed + stage("cases", lambda: check_cases(kernels, configs, options.seed, 1))


def stage(name: str, run):
    start = time.monotonic()
    result = run()
    print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    return result


def on_one_gpu(options: argparse.Namespace) -> int:
    kernels = stage("build", c.Kernels)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    failed = 0 if options.time_only else stage("checks", lambda: check_all(kernels, options, num_sms))
    if not (options.check_only or options.sanitize):
        table = time_fused.Table()
        try:
            options.keep = lambda table: keep(options, table)
            timing = time_decode if options.decode else time_fused
            stage("times", lambda: timing.one_gpu(kernels, table, num_sms, options))
        finally:
            finish(options, table)
    return failed


def finish(options: argparse.Namespace, table: time_fused.Table) -> None:
    keep(options, table)
    table.show()


def keep(options: argparse.Namespace, table: time_fused.Table) -> None:
    """Writes what there is."""
    gpus = 1 if options.mps else options.processes or 1
    if options.out:
        rate = round(table.bandwidth)
        result_file.write(options.out, table.rows, commit=options.commit, gpus=gpus, copy_bytes_per_us=rate)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser, required=False)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--decode", action="store_true", help="time decode: 1 to 128 tokens, nothing planned")
    parser.add_argument("--quick", action="store_true", help="time the smallest size alone")
    parser.add_argument("--scales-with-rows", action="store_true", help="time FP8 on one GPU as between devices")
    parser.add_argument("--small", type=int, default=24, help="random cases")
    parser.add_argument("--rounds", type=int, default=6, help="of each case, with --processes")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=220, help="after which --processes are ended")
    parser.add_argument("--blocks", type=int, help="SMs that each of the --processes fills")
    parser.add_argument("--mps", action="store_true", help="all processes on the first GPU")
    parser.add_argument("--composed-only", action="store_true", help="with --mps: do not time the fused path")
    parser.add_argument("--seed", type=int, default=int.from_bytes(np.random.bytes(3), "little"))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--init", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.rank is not None:
        options.keep = lambda table: keep(options, table)
        fused_processes.run_rank(c.Kernels(), options)
        return 0
    if options.processes:
        c.build(os.cpu_count() or 1)
        failed = fused_processes.start(options, options.seconds)
    else:
        failed = on_one_gpu(options)
    print(f"check_fused: {'FAILED' if failed else 'OK'}, seed {options.seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

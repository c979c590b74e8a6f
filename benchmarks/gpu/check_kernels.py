"""Build the CUDA kernels, check every operator against the contract, then time them.

    python3 -m benchmarks.gpu.check_kernels                 everything; times to kernels.json
    python3 -m benchmarks.gpu.check_kernels --check-only --small 12     e.g. under compute-sanitizer

Small random cases are compared with reference/oracle.py (and so is the vectorised reference), large ones with that
reference. Outputs and scratch are poisoned before every run; integers must be equal, floats close.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from reference import kernel_reference as reference
from reference import kernels_c as c
from reference import oracle
from reference.comparison import ENTROPY_ATOL, WEIGHT_RTOL, Mismatch, entropy_f64, expect, weight_f64
from reference.kernel_case import Config, Inputs, Run, make_inputs, small_configs

REPEATS, SMALL_REPEATS = 20, 3


def policy(config: Config, *names: str) -> dict[str, object]:
    return {name: getattr(config, name) for name in names}


def check_floats(config: Config, inputs: Inputs, got: dict[str, np.ndarray]) -> None:
    hidden = inputs.hidden if inputs.hidden.is_cuda or config.T < 1000 else inputs.hidden.cuda()
    expect("entropy", config, got["entropy"], entropy_f64(hidden, inputs.segment), 2e-6, ENTROPY_ATOL)
    want = weight_f64(got["entropy"], inputs.segment, config.num_segments, config.delta)
    expect("weight", config, got["weight"], want, WEIGHT_RTOL, 1e-7)
    if config.delta == 0.0:
        expect("weight at delta 0", config, got["weight"], np.where(inputs.segment >= 0, 0.5, 1.0))


def check_integers(config: Config, inputs: Inputs, got: dict[str, np.ndarray], with_oracle: bool) -> None:
    """Everything behind the weights, from the kernels' own weights, to the bit."""
    common = policy(config, "buckets", "load", "importance")
    routing = (inputs.ids, inputs.gates, got["weight"], inputs.segment)
    want = reference.load_histogram(*routing, num_experts=config.E, **common)
    expect("histogram", config, got["histogram"], want)
    lists = [a.tolist() for a in routing]
    group = want if inputs.other is None else want + inputs.other
    shift, cut = oracle.clip_threshold(
        want.tolist(), group.tolist(), inputs.modality.tolist(), num_ranks=config.R,
        **policy(config, "buckets", "scope", "load", "reroute", "protect_text", "gamma", "rho", "alpha", "c_min"),
    )  # fmt: skip
    expect("shift", config, got["shift"], np.array(shift))
    expect("cut", config, got["cut"], np.array(cut))
    order = policy(config, "scope", "reroute", "protect_text", "scoring")
    order |= common | {"num_ranks": config.R, "reroute_rounds": config.rounds}
    ids, weights, counts = reference.clip_apply(*routing, inputs.logits, np.array(shift), np.array(cut), **order)
    expect("new_ids", config, got["ids"], ids)
    expect("counts", config, got["counts"], counts)
    kept = ids == inputs.ids
    expect("kept weights", config, got["weights"][kept], inputs.gates[kept])
    expect("new_weights", config, got["weights"], weights, WEIGHT_RTOL)
    if with_oracle:
        expect("oracle histogram", config, oracle.load_histogram(*lists, num_experts=config.E, **common), want)
        slow = oracle.clip_apply(*lists, inputs.logits.tolist(), shift, cut, **order)
        expect("oracle ids", config, np.array(slow[0]).reshape(ids.shape), ids)
        expect("oracle weights", config, np.array(slow[1]).reshape(ids.shape), weights, 1e-9)
        expect("oracle counts", config, np.array(slow[2]), counts)


def run_on_device(kernels: c.Kernels, config: Config, inputs: Inputs, repeats: int) -> dict[str, np.ndarray]:
    """The operators one by one, floats checked; the fused launchers must give the same bits every time."""
    run = Run(kernels, config, inputs)
    run.poison()
    run.separate()
    got = run.outputs()
    check_floats(config, inputs, got)
    for _ in range(repeats):
        run.poison()
        run.fused()
        for name, again in run.outputs().items():
            if not np.array_equal(again.view(np.uint8), got[name].view(np.uint8)):
                wrong = np.argwhere((again.view(np.uint8) != got[name].view(np.uint8)).reshape(len(again), -1).any(1))
                raise Mismatch(f"fused {name}{wrong[:4].ravel().tolist()} of {len(wrong)} differs; {config}")
    return got


def large_configs() -> list[Config]:
    return [
        Config(T=128), Config(T=1000, num_segments=5, visual=0.7), Config(T=8192),
        Config(T=8192, scope="expert", load="effective", importance="entropy", reroute="local", num_segments=20),
        Config(T=8192, K=1, H=512), Config(T=8192, H=512, delta=0.0, importance="entropy"),
        Config(T=8191, H=520, dtype="float16", num_segments=3000, shuffled=True, visual=0.8, others=2.0),
        Config(T=65536, H=256, scoring="sigmoid", num_segments=64, visual=0.9, ids_i64=False, grid=0.25),
        Config(T=9000, H=7168, dtype="float32", gamma=0.6, scope="expert", E=160), Config(T=5000, H=16384, visual=0.3),
    ]  # fmt: skip


def check_all(kernels: c.Kernels, small: int, seed: int, large: bool, pool: Executor) -> list[Mismatch]:
    """Every case, going on after a failure: the list of failures says more than the first one.

    The references run in `pool` while the device goes on.
    """
    cases = [(config, True, SMALL_REPEATS, "cpu") for config in small_configs(small, seed)]
    cases += [(config, False, REPEATS, "cuda") for config in (large_configs() if large else [])]
    failures, pending = [], []
    for i, (config, with_oracle, repeats, device) in enumerate(cases):
        inputs = make_inputs(config, seed + i, device)
        try:
            got = run_on_device(kernels, config, inputs, repeats)
        except Mismatch as failure:
            failures.append(failure)
        else:
            pending.append(pool.submit(check_integers, config, replace(inputs, hidden=None), got, with_oracle))
    failures += [error for error in (one.exception() for one in pending) if error is not None]
    for failure in failures:
        print(failure, flush=True)
    print(f"{len(cases) - len(failures)} of {len(cases)} cases agree, seed {seed}", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--large", action="store_true", help="the large cases too, with --check-only")
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--small", type=int, default=300, help="random small cases")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="processes for references")
    parser.add_argument("--seed", type=int, default=int.from_bytes(np.random.bytes(4), "little"))
    parser.add_argument("--out", type=Path, default=Path("kernels.json"), help="JSON file for the times")
    parser.add_argument("--commit", default="unknown", help="of the sources, where git is not at hand")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        pool.submit(int).result()  # the workers start before the device does
        kernels = c.Kernels()
        large = args.large or not args.check_only
        failures = [] if args.time_only else check_all(kernels, args.small, args.seed, large, pool)
    if not args.check_only:
        from benchmarks.gpu import time_kernels

        time_kernels.report(kernels, args.out, args.commit)
    if failures:
        raise SystemExit(f"{len(failures)} cases failed, seed {args.seed}")


if __name__ == "__main__":
    main()

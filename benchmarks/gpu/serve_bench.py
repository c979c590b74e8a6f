"""SGLang's image benchmark on several GPUs, MACS off and at gamma 1.0 in alternation: TTFT, throughput, and the bounds.

    python3 -m benchmarks.gpu.serve_bench --out FILE [--ranks 2] [--go FILE]

Three servers of one launch (gpu_launches.bench_launch: 128 experts, top-8, DeepEP normal): off and 1.0, which are
timed, and 1.0 with the proof on, which counts violations while all of them warm up, and ends before anything is timed.
The images' tokens prefer the first half of the experts. All runs send the same requests, whose pictures are prepared
once: that takes a server's tokenizer 13 ms a picture, and nothing else would be timed. With --go, timing begins when
that file exists, and whatever else the GPUs did has ended. FILE is written after every round.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.check_serving import Bench, Pairs, Workload, measure_bench, ratio_interval
from benchmarks.gpu import result_file
from benchmarks.gpu.gpu_launches import Launch, bench_launch, start
from benchmarks.serving import Server, states

ROOT = Path(__file__).resolve().parents[2]

WORKLOAD = Workload(prompts=64, resolution="384x416", images=4, concurrency=64, repeated=True)
FLAGS = {
    "off": ["--macs-preset", "off"],
    "1.0": ["--macs-gamma", "1.0"],
    "proved": ["--macs-gamma", "1.0", "--macs-verify", "true"],
}
WARM_UPS = 2  # the first prepares the pictures, all of them compile kernels


@contextlib.contextmanager
def running(launch: Launch):
    """The three servers by name, started side by side."""
    logs = {name: ROOT / "build" / f"gpu-bench-{name}.log" for name in FLAGS}
    servers = {name: start(launch, flags, logs[name]) for name, flags in FLAGS.items()}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(servers)) as pool:
        for server in servers.values():
            stack.callback(server.stop)
        list(pool.map(Server.__enter__, servers.values()))
        yield servers


def proof(server: Server) -> dict:
    """What the proving server counted, over ranks and layers."""
    ranks = states(server)
    layers = [layer for state in ranks for layer in state["layers"].values()]
    dispatches = sum(layer["dispatches"] for layer in layers)
    return {
        "checks": sum(sum(state["checks"].values()) for state in ranks),
        "violations": sum(sum(state["violations"].values()) for state in ranks),
        "clipped": sum(state["own"]["clipped_visual"] + state["own"]["clipped_text"] for state in ranks),
        "max_over_mean_before": sum(layer["max_over_mean_before"] for layer in layers) / dispatches,
        "max_over_mean_after": sum(layer["max_over_mean_after"] for layer in layers) / dispatches,
    }


def wait_for(go: Path | None) -> None:
    while go is not None and not go.exists():
        time.sleep(0.5)


def case(launch: Launch, metric: str) -> dict:
    """What a row of the result file is of."""
    return {"launch": f"{launch.ranks} ranks, normal, 128 experts", **vars(WORKLOAD), "metric": metric}


def rows_of(launch: Launch, pairs: Pairs) -> list[dict]:
    """Rows of the result file, of the rounds so far."""
    rows = []
    for metric, samples in pairs.items():
        found = ratio_interval(samples)
        off, on = (list(side) for side in zip(*samples, strict=True))
        row = {"op": "e2e", "case": case(launch, metric), "off": off, "on": on, "against": "off"}
        # With too few rounds nothing bounds the median from above, and JSON has no infinity.
        bounds = [found.low, found.high] if math.isfinite(found.high) else None
        rows.append({**row, "ratio": found.median, "ci95": bounds})
    return rows


def measure(launch: Launch, servers: dict[str, Server], rounds: int, keep: Callable[[list[dict]], None]) -> dict:
    """Rows go to `keep`, after every round all there are; returns the first, the bounds. The proving server ends before
    anything is timed.
    """
    model = str(launch.model())
    with Bench() as bench:
        for turn in range(WARM_UPS):
            for server in servers.values():
                bench(server.url, model, WORKLOAD)
            print(f"serve_bench: warm-up {turn + 1} of {WARM_UPS}", flush=True)
        bounds = {"op": "e2e", "case": case(launch, "bounds"), **proof(servers["proved"])}
        servers["proved"].stop()
        keep([bounds])
        urls = [servers["off"].url, servers["1.0"].url]

        def write(pairs: Pairs) -> None:
            keep([bounds, *rows_of(launch, pairs)])

        pairs = measure_bench(bench, urls, model, rounds, WORKLOAD, write)
    for row in rows_of(launch, pairs):
        print(f"{row['case']['metric']:<20} 1.0 / off: {row['ratio']:.4f} {row['ci95']}", flush=True)
    return bounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser)
    parser.add_argument("--ranks", type=int, default=2, help="a GPU each")
    parser.add_argument("--rounds", type=int, default=6, help="runs on each of the two servers; fewer give no interval")
    parser.add_argument("--go", type=Path, help="do not time before this file exists")
    options = parser.parse_args()
    launch = bench_launch(options.ranks)
    launch.model()
    with running(launch) as servers:
        print("serve_bench: servers up", flush=True)
        wait_for(options.go)
        write = partial(result_file.write, options.out, commit=options.commit, gpus=launch.gpus)
        bounds = measure(launch, servers, options.rounds, write)
    print(f"serve_bench: {bounds['checks']} checks, {bounds['violations']} violations, {bounds['clipped']} clipped")
    return 1 if bounds["violations"] or not bounds["checks"] else 0


if __name__ == "__main__":
    sys.exit(main())

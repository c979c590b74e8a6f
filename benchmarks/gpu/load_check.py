"""Load and a fault on the real SGLang server on GPUs: mixed requests that come, end and are aborted, then a dead rank.

    python3 -m benchmarks.gpu.load_check --out FILE --launch "2 ranks, auto, all" [--requests 500]

A launch (gpu_launches.py) has three servers: MACS off, at infinite gamma, at gamma 1.0. Each gets the mix of
benchmarks/load_test.py, 16 requests at a time. Exit 0 only if no request failed, every bound held, the memory of GPUs
and hosts stayed where it was in the second half, and a killed rank ended the server within ten seconds, named by the
other.
Batches differ from run to run, and with them a last bit and a token now and then: answers at infinite gamma must be
those of off as often as off's own are, run again. With the fused dispatch the mix is sent again until as many decode
passes have run as are asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu import mps, result_file
from benchmarks.gpu.gpu_launches import LAUNCHES, RUNS, Launch, start
from benchmarks.load_test import MORE_MB, OUT, Check, Request, Sent, in_halves, mix, rank_killed, send
from benchmarks.serving import Server, states

ALIKE = 0.05  # share of answers by which two runs may differ more than off's own two
NAMED_WITHIN = 10.0  # seconds


def gpu_memory_mb() -> int:
    """Used on all GPUs."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()))


def alike(mine: list, theirs: list) -> float:
    """Share of equal answers, of those that are no aborted request's and no failure."""
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a and b]
    return sum(a == b for a, b in pairs) / max(1, len(pairs))


def decode_passes(server: Server, layers: int) -> int:
    """That the fused kernels have carried, captured ones included; 0 without them."""
    return min(state["fused_region"]["rounds"] for state in states(server)) // layers


def bounds(server: Server, run: str) -> Iterator[Check]:
    """What ranks counted of themselves."""
    ranks = states(server)
    violated = sum(sum(rank["violations"].values()) for rank in ranks)
    checked = sum(rank["checks"].get("bound", 0) for rank in ranks)
    yield Check("bounds", violated == 0 and (checked > 0 or run == "off"), f"{checked} checked, {violated} violated")
    clipped = sum(rank["own"]["clipped_visual"] + rank["own"]["clipped_text"] for rank in ranks)
    yield Check("clipping", (clipped > 0) == (run == "1.0"), f"{clipped} assignments clipped")


def under_load(server: Server, run: str, plan: list[Request], passes: int, layers: int) -> tuple[Sent, list[Check]]:
    """The mix, and again until there were as many decode passes; what must hold on the way."""
    before = gpu_memory_mb()
    sent = in_halves(server, plan)
    warm, sends, errors = gpu_memory_mb(), 1, []
    while passes and not errors and decode_passes(server, layers) < passes and sends < 50:
        errors += send(server, mix(len(plan), seed=sends))[1]
        sends += 1
    grown = gpu_memory_mb() - warm
    checks = [
        sent.check,
        Check("memory of the host", sent.grown_mb < MORE_MB, f"{sent.grown_mb:+.0f} MB in the second half"),
        Check("memory of GPUs", grown < MORE_MB, f"{grown:+d} MB, {warm - before:+d} in the first mix"),
        *bounds(server, run),
    ]
    if passes:
        done = decode_passes(server, layers)
        checks.append(Check("decode passes", done >= passes and not errors, f"{done} in {sends} mixes; {errors[:2]}"))
    return sent, checks


def check_launch(launch: Launch, requests: int, passes: int, folder: Path) -> Iterator[tuple[str, Check]]:
    """(run, check) as they come. Servers start side by side, and are loaded one after the other."""
    plan = mix(requests)
    # Servers are loaded in turn: all of them may have the same SMs.
    sharing = mps.shared_gpu(launch.ranks) if launch.one_gpu else contextlib.nullcontext({})
    with ThreadPoolExecutor(len(RUNS)) as pool, sharing as client:
        servers = {run: start(launch, flags, folder / f"load-{run}.log", client) for run, flags in RUNS.items()}
        try:
            list(pool.map(Server.__enter__, servers.values()))
            answers: dict[str, list] = {}
            for run, server in servers.items():
                of_fused = passes if launch.fused and run != "off" else 0
                sent, checks = under_load(server, run, plan, of_fused, launch.layers)
                answers[run] = sent.answers
                yield from ((run, check) for check in checks)
                if run == "off":
                    noise = alike(send(server, plan)[0], sent.answers)
            found = alike(answers["inf"], answers["off"])
            words = f"{found:.1%} as without MACS; without MACS {noise:.1%} as the time before"
            yield "inf", Check("answers", found >= noise - ALIKE, words)
            yield from (("1.0", check) for check in rank_killed(servers["1.0"], within_s=NAMED_WITHIN))
        finally:
            for server in servers.values():
                server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser)
    parser.add_argument("--launch", default="2 ranks, auto, all", choices=list(LAUNCHES))
    parser.add_argument("--requests", type=int, default=500, help="of a mix")
    parser.add_argument("--decode-passes", type=int, default=0, help="that the fused kernels carry at least")
    options = parser.parse_args()
    launch = LAUNCHES[options.launch]
    launch.model()
    rows, failed = [], []
    for run, check in check_launch(launch, options.requests, options.decode_passes, OUT.parent):
        print(f"{'ok  ' if check.ok else 'FAIL'} {run}: {check.name:<36} {check.found}", flush=True)
        rows.append({"op": "load", "case": {"launch": options.launch, "gamma": run}, **asdict(check)})
        failed += [] if check.ok else [f"{run}: {check.name}"]
        result_file.write(options.out, rows, commit=options.commit, gpus=launch.gpus)
    print(f"load_check {'FAILED: ' + ', '.join(failed) if failed else 'OK'}: {len(rows)} checks")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

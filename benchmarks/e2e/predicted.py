"""What `sglang-macs simulate` says of a measured run, and how far it is off: time over that of MACS off, by variant.

    python3 -m benchmarks.e2e.predicted docs/results/e2e_prefill_h200x2.json

Rows of FILE that have an `off` under the same dispatch beside them. The simulated pass is of the same model, routing
and number of ranks; the host, which the simulation does not know, cancels out only where GPUs are the bottleneck.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.e2e import servers
from benchmarks.gpu.gpu_launches import expert_location
from sglang_macs.simulate import machines, replicas, study, times

CONTEXT = 2048  # tokens that attention looks at: a prompt of the benchmark


def routed(layers: int, skew: float, ranks: int, assignments: int) -> np.ndarray:
    """[layers, E] rows of each expert, as the benchmark routes them: a rank's experts alike, the others' too."""
    experts = servers.TEXT["num_experts"]
    spread = servers.published_spread(layers, skew) if skew > 1 else [1.0] * layers
    rows = np.empty((layers, ranks))
    for layer, largest in enumerate(spread):
        rows[layer] = (ranks - largest) / (ranks - 1)
        rows[layer, layer % ranks] = largest
    return np.repeat(rows, experts // ranks, axis=1) * assignments / experts


def of_variant(rows: np.ndarray, variant: servers.Variant, ranks: int) -> tuple[np.ndarray, bool]:
    """What arrives [layers, P], and whether there is a plan."""
    if variant.balanced:
        return np.full_like(rows, rows.sum(1).mean() / rows.shape[1]), False
    given = dict(zip(variant.flags, variant.flags[1:], strict=False))
    if "--macs-gamma" not in given:
        return rows, False
    if variant.redundant:
        location = expert_location(1, rows.shape[1], variant.redundant, ranks)
        mapped = np.array(json.loads(location)["physical_to_logical_map"][0])
        rows = replicas.spread(rows[:, None], mapped, ranks, balance=True)[:, 0]
    return bounded(rows, float(given["--macs-gamma"]), ranks), True


def bounded(rows: np.ndarray, gamma: float, ranks: int) -> np.ndarray:
    """Every rank's rows cut to gamma times the mean; the overflow goes to the ranks that have room, by their room."""
    if np.isinf(gamma):
        return rows
    of_rank = rows.reshape(len(rows), ranks, -1).sum(-1)
    kept = np.minimum(of_rank, gamma * of_rank.mean(1, keepdims=True))
    room = gamma * of_rank.mean(1, keepdims=True) - kept
    share = (of_rank - kept).sum(1, keepdims=True) / np.maximum(room.sum(1, keepdims=True), 1)
    after = kept + room * np.minimum(share, 1)  # more than all room is dropped
    return rows * np.repeat(after / np.maximum(of_rank, 1), rows.shape[1] // ranks, axis=1)


def pass_us(case: dict, variant: servers.Variant, machine: machines.Machine) -> float:
    """Simulated time of one forward pass."""
    model = machines.MODELS["qwen3-vl-30b-a3b"]
    ranks, fp8 = case["ranks"], case["dtype"] == "fp8"
    cluster = times.Cluster(machine, model, ranks, case["tokens"], fp8)
    rows = routed(case["layers"], case["skew"], ranks, case["tokens"] * ranks * model.top_k)
    arrived, planned = of_variant(rows, variant, ranks)
    stage = study.stages_us(arrived, cluster)[0] + times.other_us(cluster, CONTEXT)
    plan = times.plan_us(cluster) + times.exchange_us(cluster, 128, "flat") if planned else 0.0
    return float(stage.sum() + case["layers"] * plan)


def compared(result: dict, machine: machines.Machine) -> Iterator[tuple[dict, float, float]]:
    """(case, measured, simulated) of each row beside an `off`: pass time over off's."""
    variants = {(v.name, v.dispatch): v for v in servers.VARIANTS}
    measured = {json.dumps(row["case"], sort_keys=True): row["pass_ms"] for row in result["rows"]}
    for row in result["rows"]:
        case = row["case"]
        off = {**case, "variant": "off"}
        base = measured.get(json.dumps(off, sort_keys=True))
        if base is None or case["variant"] == "off":
            continue
        mine = variants[case["variant"], case["dispatch"]]
        simulated = pass_us(case, mine, machine) / pass_us(off, variants["off", case["dispatch"]], machine)
        yield case, row["pass_ms"] / base, simulated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="that benchmarks.e2e.prefill has written")
    parser.add_argument("--machine", default="h200", choices=list(machines.MACHINES))
    options = parser.parse_args()
    found = list(compared(json.loads(options.file.read_text()), machines.MACHINES[options.machine]))
    print("| ranks | tokens per rank | max/mean | variant | dispatch | measured | simulated | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for case, measured, simulated in found:
        cells = [case["ranks"], f"{case['tokens']:,}", case["skew"], case["variant"], case["dispatch"]]
        cells += [f"{measured:.3f}", f"{simulated:.3f}", f"{simulated - measured:+.3f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())

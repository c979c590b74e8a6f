"""What the plan costs in front of DeepEP's low-latency dispatch and combine, on one rank, in one run.

    python3 scripts/gpu/overhead.py --out FILE        (sglang's deep_ep installed)

Each row is a CUDA graph of several rounds: DeepEP's dispatch and combine alone, the same behind the plan, and the plan
alone. The plan bounds eight ranks (E = 128, top-8), as on a cluster; DeepEP's group is one rank, so the exchange is not
in it. `10 % clipped`: gamma where a tenth of the assignments is over a bound, nothing re-routed, so rows get fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import deep_ep  # noqa: E402
import routing  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from sglang_macs.config import MacsConfig  # noqa: E402
from sglang_macs.plan import Plan  # noqa: E402

TOKENS, EXPERTS, RANKS, TOP_K = 128, 128, 8, 8
ROUNDS, REPLAYS = 8, 60  # rounds in a graph, over as many batches; replays of each graph, in turn


class Layer:
    """DeepEP's buffer for one hidden size, and batches of fresh random tokens."""

    def __init__(self, hidden_size: int, fp8: bool) -> None:
        self.fp8 = fp8
        size = deep_ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, hidden_size, 1, EXPERTS)
        self.buffer = deep_ep.Buffer(
            dist.group.WORLD,
            num_rdma_bytes=size,
            low_latency_mode=True,
            num_qps_per_rank=EXPERTS,
            explicitly_destroy=True,
        )
        bias = routing.fit_bias(routing.skewed(EXPERTS, RANKS, 1.5), TOP_K)
        self.batches = [self._batch(bias, hidden_size, seed) for seed in range(ROUNDS)]
        self.output = torch.randn(EXPERTS, TOKENS, hidden_size, device="cuda").bfloat16()  # stands for the experts'

    def _batch(self, bias, hidden_size: int, seed: int) -> dict:
        ids, gates, logits = routing.route(bias, TOKENS, TOP_K, 500 + seed)
        generator = torch.Generator(device="cuda").manual_seed(seed)
        hidden = torch.randn(TOKENS, hidden_size, generator=generator, device="cuda").bfloat16()
        segment = torch.where(torch.rand(TOKENS, generator=generator, device="cuda") < 0.9, 0, -1).int()
        return {"hidden": hidden, "ids": ids, "gates": gates, "logits": logits, "segment": segment}

    def plan(self, plan: Plan, batch: dict):
        """(ids, gates) of the plan."""
        result = plan(batch["hidden"], batch["ids"], batch["gates"], batch["logits"], batch["segment"], 1)
        return result.topk_ids, result.topk_weights

    def round_trip(self, hidden, ids, gates):
        """Dispatch and combine; the experts' output is made beforehand."""
        received, counts, handle, _, _ = self.buffer.low_latency_dispatch(
            hidden, ids, TOKENS, EXPERTS, use_fp8=self.fp8
        )
        combined, _, _ = self.buffer.low_latency_combine(self.output, ids, gates, handle)
        return received, counts, combined


def capture(one_round, batches: list[dict]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for batch in batches[:2]:
            one_round(batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [one_round(batch) for batch in batches]
    graph.kept = kept  # outputs live as long as the graph
    return graph


def medians_us(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Median microseconds of one round of each graph; the graphs take turns, so that drift falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(REPLAYS + 5):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 5:
                times[name].append(start.elapsed_time(end) * 1e3 / ROUNDS)
    return {name: sorted(samples)[len(samples) // 2] for name, samples in times.items()}


def clipped_share(layer: Layer, gamma: float) -> float:
    plan = Plan(MacsConfig.from_preset("rank", gamma=gamma, reroute="none"), EXPERTS, RANKS)
    kept = [(layer.plan(plan, batch)[0] >= 0).float().mean() for batch in layer.batches]
    return 1 - float(torch.stack(kept).mean())


def gamma_for(layer: Layer, share: float) -> float:
    """The gamma at which `share` of the assignments is clipped."""
    low, high = 0.5, 3.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if clipped_share(layer, middle) > share else (low, middle)
    return high


def measure(hidden_size: int, fp8: bool, clipped: float) -> dict:
    """One row: DeepEP alone, behind the plan, and the plan alone."""
    layer = Layer(hidden_size, fp8)
    gamma = gamma_for(layer, clipped) if clipped else 3.0
    options = {"reroute": "none"} if clipped else {}
    plan = Plan(MacsConfig.from_preset("rank", gamma=gamma, **options), EXPERTS, RANKS)
    graphs = {
        "deepep": capture(lambda b: layer.round_trip(b["hidden"], b["ids"], b["gates"]), layer.batches),
        "planned": capture(lambda b: layer.round_trip(b["hidden"], *layer.plan(plan, b)), layer.batches),
        "plan": capture(lambda b: layer.plan(plan, b), layer.batches),
    }
    for batch in layer.batches:  # what a graph sent is what the plan decided
        ids, gates = layer.plan(plan, batch)
        _, counts, combined = layer.round_trip(batch["hidden"], ids, gates)
        assert int(counts.sum()) == int((ids >= 0).sum()), "DeepEP received other rows than the plan kept"
        assert torch.isfinite(combined.float()).all()
    times = medians_us(graphs)
    row = {
        "case": {"T": TOKENS, "H": hidden_size, "dtype": "fp8" if fp8 else "bf16", "clipped": clipped},
        "gamma": gamma,
        "clipped_share": clipped_share(layer, gamma) if clipped else 0.0,
        **{f"{name}_us": value for name, value in times.items()},
        "overhead_us": times["planned"] - times["deepep"],
        "overhead_percent": 100 * (times["planned"] / times["deepep"] - 1),
    }
    del graphs
    layer.buffer.destroy()
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29671")
    dist.init_process_group("gloo", rank=0, world_size=1)
    rows = []
    print(f"{'H':>5s} {'dtype':5s} {'clipped':>7s} {'DeepEP':>8s} {'planned':>8s} {'plan':>8s} {'overhead':>15s}")
    for hidden_size in (2048, 7168):
        for fp8 in (False, True):
            for clipped in (0.0, 0.1):
                row = measure(hidden_size, fp8, clipped)
                rows.append(row)
                case = row["case"]
                print(
                    f"{case['H']:5d} {case['dtype']:5s} {row['clipped_share']:7.1%} {row['deepep_us']:8.1f} "
                    f"{row['planned_us']:8.1f} {row['plan_us']:8.1f} {row['overhead_us']:8.1f} "
                    f"{row['overhead_percent']:5.1f}%",
                    flush=True,
                )
                result = {
                    "gpu": torch.cuda.get_device_name(),
                    "commit": options.commit,
                    "command": "python3 scripts/gpu/overhead.py",
                    "date": datetime.now(UTC).date().isoformat(),
                    "rows": rows,
                }
                Path(options.out).write_text(json.dumps(result, indent=1))
    print("overhead: OK")
    return 0


if __name__ == "__main__":
    sys.exit(main())

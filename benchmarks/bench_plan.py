"""The C++ scorer and plan against a vectorised torch version of the same, in the same run, on this machine's CPU.

    python -m benchmarks.bench_plan [--json] [--out FILE]
    python -m benchmarks.bench_plan --importance MODULE:FUNCTION      a plan by the gate, and by that function

Both compute docs/design/method.md; before timing, their integer results are compared. Times are medians; ratios are
what counts.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch
from torch import Tensor

from sglang_macs import ops
from sglang_macs.config import MacsConfig
from sglang_macs.plan import importance
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens

CASE = {"T": 8192, "H": 2048, "E": 128, "K": 8, "R": 8, "dtype": "bf16"}


def inputs(seed: int, tokens: int = CASE["T"]) -> dict[str, Tensor]:
    """Skewed routing, two thirds visual tokens, normalised gates."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, CASE["H"], generator=g).bfloat16()
    logits = torch.randn(tokens, CASE["E"], generator=g) + torch.linspace(1, 0, CASE["E"])
    weights, ids = torch.softmax(logits, -1).topk(CASE["K"])
    segment = torch.where(torch.rand(tokens, generator=g) < 0.67, 0, -1).int()
    return {
        "hidden": hidden,
        "logits": logits,
        "ids": ids,
        "weights": weights / weights.sum(-1, True),
        "segment": segment,
    }


def torch_score(hidden: Tensor, segment: Tensor) -> Tensor:
    """Entropies of the visual rows by torch's own softmax."""
    entropy = torch.zeros(hidden.shape[0])
    log_p = torch.log_softmax(hidden[segment >= 0].float(), dim=-1)
    entropy[segment >= 0] = -(log_p.exp() * log_p).sum(dim=-1)
    return entropy


def torch_weight(entropy: Tensor, segment: Tensor, delta: float) -> Tensor:
    visual = segment >= 0
    std, mean = torch.std_mean(entropy[visual], correction=0)
    return torch.where(visual, torch.sigmoid(-delta * (entropy - mean) / (std + 1e-6)), 1.0)


def torch_levels(config: MacsConfig, x: dict[str, Tensor], weight: Tensor) -> Tensor:
    """[T, K] level of each assignment before pressure (docs/design/method.md 3 and 4)."""
    importance = weight[:, None] * x["weights"]
    bits = config.buckets.bit_length() - 5
    bucket = (importance.view(torch.int32) >> (23 - bits)) - ((127 - 16) << bits)
    bucket = bucket.clamp(0, config.buckets - 1).masked_fill(importance <= 0, 0)
    return bucket + (x["segment"] < 0)[:, None] * config.buckets


def torch_clip(config: MacsConfig, x: dict[str, Tensor], weight: Tensor) -> Tensor:
    """[T, K] bool: assignments that a rank's bound keeps (scope rank, one rank in the group, no re-routing)."""
    level = torch_levels(config, x, weight).flatten()
    experts, buckets = x["ids"].flatten(), config.buckets
    load = torch.bincount(experts, minlength=CASE["E"]).double()
    capacity = config.gamma * experts.numel() / CASE["E"]
    ratio = (load / capacity).float().clamp(min=1.0)
    bits = buckets.bit_length() - 5
    log2 = ratio.view(torch.int32).long() - (127 << 23)
    shift = ((log2 * round(65536 * config.alpha) + (1 << (38 - bits))) >> (39 - bits)).clamp(max=buckets - 1)
    text = level >= buckets
    level = (level - text * buckets - shift[experts]).clamp(min=0) + text * buckets
    rank = experts // (CASE["E"] // CASE["R"])
    # Most important first within each rank; a stable sort keeps (token, slot) order among equals.
    order = torch.argsort(rank * 2 * buckets + (2 * buckets - 1 - level), stable=True)
    start = torch.cumsum(torch.bincount(rank, minlength=CASE["R"]), 0) - torch.bincount(rank, minlength=CASE["R"])
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel()) - start[rank[order]]
    bound = int(config.gamma * experts.numel() / CASE["R"])
    return (position < bound).view_as(x["ids"])


def median_us(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and 99th percentile of `repeats` runs, in microseconds, after two that warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    times = sorted(times[2:])
    return statistics.median(times), times[int(0.99 * (len(times) - 1))]


def check_equal(config: MacsConfig, x: dict[str, Tensor]) -> None:
    """Ends the run if the two versions decide differently: a fast wrong answer is not a result."""
    plan = Plan(config, CASE["E"], CASE["R"])
    result = plan(RoutedTokens(x["hidden"], x["ids"], x["weights"], None, x["segment"], 1))
    kept = torch_clip(config, x, result.weight)
    if not torch.equal(result.topk_ids >= 0, kept):
        sys.exit(f"bench_plan: the versions differ in {int(((result.topk_ids >= 0) != kept).sum())} assignments")


def measure(repeats: int, seed: int) -> list[dict]:
    """Rows of the result file: score and plan, each against torch."""
    config = MacsConfig.from_preset("rank", gamma=1.05, reroute="none")
    x = inputs(seed)
    check_equal(config, x)
    plan = Plan(config, CASE["E"], CASE["R"])
    tokens = RoutedTokens(x["hidden"], x["ids"], x["weights"], None, x["segment"], 1)

    def torch_plan() -> Tensor:
        weight = torch_weight(torch_score(x["hidden"], x["segment"]), x["segment"], config.delta)
        keep = torch_clip(config, x, weight)
        return torch.where(keep, x["ids"], -1), torch.where(keep, x["weights"], 0.0)

    pairs = {
        "score": (
            lambda: ops.entropy_score(x["hidden"], x["segment"]),
            lambda: torch_score(x["hidden"], x["segment"]),
        ),
        "plan": (lambda: plan(tokens), torch_plan),
    }
    rows = []
    for op, (ours, reference) in pairs.items():
        median, p99 = median_us(ours, repeats)
        against, _ = median_us(reference, repeats)
        bytes_read = CASE["T"] * CASE["H"] * 2
        row = {
            "op": op,
            "case": CASE,
            "median_us": median,
            "p99_us": p99,
            "bytes": bytes_read,
            "against": f"torch_{op}",
        }
        rows.append({**row, "against_us": against, "ratio": median / against})
    return rows


def cpu_ms(run: Callable[[], object], repeats: int) -> float:
    """CPU time of the fastest of `repeats` runs: what else the machine does is not in it."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times) * 1e3


def compare_importance(name: str, repeats: int, seed: int) -> str:
    """The default plan by the gate, by the gate as a function, and by the function `name`; and that alone."""
    x = inputs(seed, tokens=2048)
    tokens = RoutedTokens(x["hidden"], x["ids"], x["weights"], x["logits"], x["segment"], 1)
    own = importance.load(name)
    functions = (None, lambda given: given.topk_weights, own)
    plans = [Plan(MacsConfig.from_preset("rank"), CASE["E"], CASE["R"], own_importance=f) for f in functions]
    gate, around, whole = (cpu_ms(lambda plan=plan: plan(tokens), repeats) for plan in plans)
    alone = cpu_ms(lambda: own(tokens), repeats)
    by = f"by the gate {gate:.1f} ms, by the gate as a function {around:.1f}, by {name} {whole:.1f} ({alone:.1f} in it)"
    return f"{len(tokens.topk_ids)} tokens, CPU time of a plan {by}"


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result file instead of a table")
    parser.add_argument("--out", help="write the result file here, too")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--importance", metavar="MODULE:FUNCTION", help="time a plan by this function instead")
    options = parser.parse_args()
    if options.importance:
        print(compare_importance(options.importance, options.repeats, options.seed))
        return 0
    rows = measure(options.repeats, options.seed)
    result = {
        "gpu": "none",
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "commit": commit(),
        "command": "python -m benchmarks.bench_plan --json",
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for row in rows:
            ours_ms, torch_ms = row["median_us"] / 1e3, row["against_us"] / 1e3
            print(f"{row['op']:<6} {ours_ms:8.2f} ms   torch {torch_ms:8.2f} ms   {torch_ms / ours_ms:5.1f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())

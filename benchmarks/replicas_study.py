"""What replicas buy on published expert loads: the fullest rank, and what is left over a bound.

    python -m benchmarks.replicas_study [--batches 48] [--out docs/results/replicas.json]

Loads of the first eight layers of Qwen3-VL-30B-A3B (sglang_macs/simulate): layers 0 and 3 have their published rows of
each expert, the others rows of these dealt so that eight ranks come out as uneven as published. A batch multiplies
every expert's share by a log-normal whose spread is fitted, layer by layer, so that eight linear ranks are on average
as uneven as published; each source rank by another one (single requests are less even than batches). 6,530 tokens a
rank.

Placements are EPLB's own (SGLang's code) from the summed loads of 32 other batches. Choices of a replica:
    linear:  no replicas, experts in order
    static:  SGLang's: the copy on the own rank, else a fixed one for each source
    dynamic: SGLang's: any copy, at random
    balance: the product's operator
`clipped` are the rows over gamma times the mean, of all rows: before any re-routing.
"""

import argparse
import json
import random
import subprocess
from datetime import date
from pathlib import Path

import numpy as np
import torch

from sglang_macs import cpu_compat, ops
from sglang_macs.config import MacsConfig
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan
from sglang_macs.simulate import loads

LAYERS, TOKENS, OTHERS = 8, 6530, 32
SOURCE_SPREAD = 0.35
CLUSTERS = [(8, 0), (8, 16), (8, 32), (16, 0), (16, 16), (16, 32), (32, 0), (32, 32)]
GAMMAS = (1.0, 1.05, 1.1)


def batches(rows: np.ndarray, spread: float, count: int, num_ranks: int, top_k: int, seed: int) -> np.ndarray:
    """[count, R, E] rows of each source rank."""
    rng = np.random.default_rng(seed)
    share = rows * np.exp(spread * rng.standard_normal((count, 1, len(rows))))
    share = share * np.exp(SOURCE_SPREAD * rng.standard_normal((count, num_ranks, len(rows))))
    return rng.multinomial(TOKENS * top_k, share / share.sum(-1, keepdims=True))


def fitted_spread(rows: np.ndarray, top_k: int, target: float) -> float:
    """Of which eight linear ranks have `target` as their mean maximum over mean."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        drawn = batches(rows, middle, 64, 8, top_k, seed=1).sum(1)
        low, high = (middle, high) if loads.max_over_mean(drawn, 8).mean() < target else (low, middle)
    return low


def eplb(counts: np.ndarray, num_physical: int, num_ranks: int) -> list[int]:
    """SGLang's placement for these counts [E]."""
    cpu_compat.allow_torchvision()
    from sglang.srt.eplb.eplb_algorithms import deepseek

    weight = torch.tensor(counts, dtype=torch.float32).unsqueeze(0)
    return deepseek.rebalance_experts(weight, num_physical, None, 1, num_ranks, False)[0][0].tolist()


def chosen(sources: np.ndarray, mapped: list[int], num_ranks: int, choice: str) -> np.ndarray:
    """[R] rows of each rank for one batch [R, E], as SGLang chooses."""
    width, result, pick = len(mapped) // num_ranks, np.zeros(num_ranks), random.Random(42)
    for expert in range(sources.shape[1]):
        ranks = [p // width for p, e in enumerate(mapped) if e == expert]
        if choice == "dynamic":
            np.add.at(result, ranks, sources[:, expert].sum() / len(ranks))
            continue
        far = [s for s in range(num_ranks) if s not in ranks]
        fair = (ranks * (len(far) // len(ranks) + 1))[: len(far)]
        pick.shuffle(fair)
        np.add.at(result, [s for s in range(num_ranks) if s in ranks], sources[sorted(set(ranks)), expert])
        np.add.at(result, fair, sources[far, expert])
    return result


def balanced(rows: np.ndarray, plan: Plan) -> np.ndarray:
    """[R] rows of each rank for the group's rows [E], by the operator that serves."""
    exchanged = torch.zeros(plan.histogram_size, dtype=torch.int32)
    cells = exchanged[: plan.num_experts * 2 * plan.config.buckets].view(plan.num_experts, -1)
    cells[:, 0] = torch.from_numpy(rows.astype(np.int32))
    exchanged[cells.numel()] = int(rows.sum())
    table = plan.places.table(exchanged.device)
    return ops.replica_balance(exchanged, exchanged, plan.modality, plan.policy, table)[2].numpy()


def study(count: int) -> list[dict]:
    published = loads.published()
    raw = json.loads((Path(loads.__file__).parent / loads.PUBLISHED).read_text())
    targets = raw["rank_max_over_mean_ep8"]["per_layer_mean"]
    rows = [published.rows[layer, 0].sum(0) for layer in range(LAYERS)]
    spreads = [fitted_spread(of_layer, published.top_k, t) for of_layer, t in zip(rows, targets, strict=False)]
    print("spread of each layer:", " ".join(f"{s:.2f}" for s in spreads))
    results = []
    for num_ranks, redundant in CLUSTERS:
        by_choice: dict[str, list[np.ndarray]] = {c: [] for c in ("linear", "static", "dynamic", "balance")}
        for of_layer, spread in zip(rows, spreads, strict=True):
            drawn = batches(of_layer, spread, count + OTHERS, num_ranks, published.top_k, seed=2)
            mapped = eplb(drawn[count:].sum((0, 1)), len(of_layer) + redundant, num_ranks)
            places = Places(len(of_layer), len(mapped), num_ranks, 0, mapped)
            plan = Plan(MacsConfig(buckets=32), len(of_layer), num_ranks, places=places)
            for batch in drawn[:count]:
                total = batch.sum(0)
                by_choice["linear"].append(total.reshape(num_ranks, -1).sum(1))
                for choice in ("static", "dynamic"):
                    by_choice[choice].append(chosen(batch, mapped, num_ranks, choice))
                by_choice["balance"].append(balanced(total, plan))
        for choice, of_batches in by_choice.items():
            per_rank = np.array(of_batches)
            mean = per_rank.mean(1, keepdims=True)
            uneven = per_rank.max(1) / mean[:, 0]
            for gamma in GAMMAS:
                over = np.maximum(0, per_rank - np.floor(gamma * mean)).sum(1) / per_rank.sum(1)
                case = {"ep": num_ranks, "redundant": redundant, "choice": choice, "gamma": gamma}
                figures = {"max_over_mean": uneven.mean(), "p95": np.quantile(uneven, 0.95), "clipped": over.mean()}
                results.append({"case": case} | {name: round(float(value), 4) for name, value in figures.items()})
            print(num_ranks, redundant, f"{choice:8}", " ".join(str(r["clipped"]) for r in results[-3:]), results[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=48, help="of each layer (default: 48)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/replicas.json"))
    given = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {"commit": commit.stdout.strip(), "date": date.today().isoformat(), "gpu": "none, simulated"}
    about["command"] = f"python -m benchmarks.replicas_study --batches {given.batches}"
    rows = study(given.batches)
    given.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

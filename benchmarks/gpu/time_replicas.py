"""What replicas add to a plan: its time by CUDA graph replay, without places and with 0 to 32 redundant experts.

    python3 -m benchmarks.gpu.time_replicas --out docs/results/replicas_plan_h200.json

One rank of eight is the group; the case is that of docs/results/kernels.md. `ratio` is against the plan without places.
"""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.gpu import result_file
from benchmarks.gpu.time_kernels import HOT, graph_us
from reference import cases, replica_cases
from reference.kernel_case import Config, make_inputs
from sglang_macs.config import MacsConfig
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens


def plan_us(config: Config, redundant: int | None) -> tuple[float, float]:
    """Median and p99; redundant: None without places."""
    raw = make_inputs(config, 7, "cuda")
    ids, gates, logits, segment = (torch.from_numpy(x).cuda() for x in (raw.ids, raw.gates, raw.logits, raw.segment))
    places = None
    if redundant is not None:
        mapped = replica_cases.placement(cases.generator(1), config.E, config.E + redundant)
        places = Places(config.E, len(mapped), config.R, 0, mapped)
        first = torch.tensor([mapped.index(expert) for expert in range(config.E)], device="cuda")
        ids = torch.where(ids < 0, -1, first[ids.clamp(min=0).long()]).to(ids.dtype)
    options = MacsConfig.from_preset("rank", gamma=config.gamma)
    plan = Plan(options, config.E, config.R, torch.from_numpy(raw.modality).cuda(), places=places)
    routed = RoutedTokens(raw.hidden, ids, gates, logits, segment, 1)
    return graph_us([lambda: plan(routed)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser)
    options = parser.parse_args()
    rows = []
    for tokens in (128, 1024, 8192):
        config = Config(T=tokens, hot=HOT)
        base = None
        for redundant in (None, 0, 8, 32):
            median, p99 = plan_us(config, redundant)
            base = base or median
            case = {"T": tokens, "E": config.E, "K": config.K, "R": config.R, "redundant": redundant}
            rows.append({"op": "plan", "case": case, "median_us": round(median, 2), "p99_us": round(p99, 2),
                         "against": "plan without places", "ratio": round(median / base, 3)})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    result_file.write(options.out, rows, commit=options.commit)


if __name__ == "__main__":
    main()

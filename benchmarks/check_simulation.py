"""How far `sglang-macs simulate` is from what was measured: the expert stage of the slowest rank.

    python -m benchmarks.check_simulation [docs/results/straggler_h200.json] [--machine h200] [--when alone|together]

Reads what benchmarks/gpu/straggler.py wrote: eight ranks on one GPU, each with its share of the SMs and, timed
alone, of nothing else. So the machine's GEMM rate is divided by the ranks, its memory bandwidth is not. Rows of single
experts are taken where they were recorded; otherwise a rank's rows are spread evenly over its experts.

Prints predicted against measured times of every method that clipped, and the error of the speed-up, which is what the
simulation is for. The machine's GEMM efficiency is not fitted to the file.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace

import numpy as np

from sglang_macs.errors import MacsError
from sglang_macs.simulate.machines import MACHINES, MODELS
from sglang_macs.simulate.times import Cluster, expert_us


@dataclass(frozen=True)
class Compared:
    """Predicted and measured microseconds of one case, unclipped and clipped."""

    case: str
    predicted: tuple[float, float]
    measured: tuple[float, float]

    @property
    def time_error(self) -> float:
        """Of the unclipped time, as a share of the measured one; positive: predicted too slow."""
        return self.predicted[0] / self.measured[0] - 1

    @property
    def speedup_error(self) -> float:
        """Of unclipped / clipped, as a share of the measured one."""
        return (self.predicted[0] / self.predicted[1]) / (self.measured[0] / self.measured[1]) - 1


def cluster_of(result: dict, machine_name: str) -> Cluster:
    """The part of a machine that one rank of the measurement had."""
    ranks, whole = result["ranks"], MACHINES[machine_name]
    machine = replace(whole, bf16_flop_per_us=whole.bf16_flop_per_us / ranks)
    sizes = {"hidden": result["hidden_size"], "intermediate": result["intermediate_size"], "experts": result["experts"]}
    return Cluster(machine, replace(MODELS["qwen3-vl-30b-a3b"], **sizes, name="measured"), ranks, tokens=0)


def rows_of(row: dict, experts: int) -> np.ndarray:
    """[E] rows of each expert."""
    if "expert_rows" in row:
        return np.array(row["expert_rows"], float).reshape(experts)
    local = experts // len(row["rows"])
    return np.repeat(np.array(row["rows"], float) / local, local)


def compare(result: dict, machine_name: str, when: str = "alone") -> list[Compared]:
    """Every clipped row of the file beside its unclipped one. Raises MacsError for a file without the fields."""
    try:
        cluster, experts, compared = cluster_of(result, machine_name), result["experts"], []
        before: dict = {}
        for row in result["rows"]:
            case = row["case"]
            predicted = float(expert_us(rows_of(row, experts), cluster).max())
            measured = float(max(row[f"{when}_us"]))
            if case["method"] == "unclipped":
                before = {"predicted": predicted, "measured": measured}
            elif row["assignments"]["clipped"]:
                name = f"{case['tokens_per_rank']:5d} tokens, {case['routing']}, {case['method']} {case['gamma']}"
                pairs = (before["predicted"], predicted), (before["measured"], measured)
                compared.append(Compared(name, *pairs))
        return compared
    except (KeyError, TypeError, ValueError) as error:
        raise MacsError("straggler result", repr(error), "a file of benchmarks/gpu/straggler.py") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="docs/results/straggler_h200.json")
    parser.add_argument("--machine", choices=list(MACHINES), default="h200")
    parser.add_argument("--when", choices=["alone", "together"], default="alone")
    parser.add_argument("--most", type=float, default=None, help="exit 1 if the mean error of the speed-up is larger")
    options = parser.parse_args()
    try:
        with open(options.file, encoding="utf-8") as file:
            compared = compare(json.load(file), options.machine, options.when)
    except (OSError, ValueError) as error:  # MacsError is a ValueError
        print(f"check_simulation: {error}", file=sys.stderr)
        return 2
    if not compared:
        print(f"check_simulation: no clipped rows in {options.file}", file=sys.stderr)
        return 2
    for c in compared:
        pairs = zip(c.predicted, c.measured, strict=True)
        times = "   ".join(f"{p:6.0f} us against {m:6.0f}" for p, m in pairs)
        print(f"{c.case:<34} {times}   time {c.time_error:+6.1%}   speed-up {c.speedup_error:+6.1%}")
    mean = float(np.mean([abs(c.speedup_error) for c in compared]))
    print(f"mean error: time {np.mean([abs(c.time_error) for c in compared]):.1%}, speed-up {mean:.1%}")
    return 1 if options.most is not None and mean > options.most else 0


if __name__ == "__main__":
    sys.exit(main())

"""How far `sglang-macs simulate` is from what was measured: the expert stage of the slowest rank.

    python scripts/check_simulation.py [docs/results/straggler.json] [--machine h200]

The file is a result file whose rows have `op` "straggler" and

    case:     {"ranks": R, "E": experts, "H": hidden, "I": intermediate, "dtype": "bf16" | "fp8",
               "rows": [R][E / R] rows of each expert, "rows_clipped": the same after the plan}
    measured: {"unclipped_us": .., "clipped_us": ..}   slowest rank's expert GEMMs

Prints predicted against measured times, and the error of the speed-up, which is what the simulation is for. The
machine's GEMM efficiency is not fitted to the file.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace

import numpy as np

from sglang_macs.errors import MacsError
from sglang_macs.machines import MACHINES, MODELS
from sglang_macs.simulate.times import Cluster, expert_us

FORMS = (("rows", "unclipped_us"), ("rows_clipped", "clipped_us"))


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


def compare(row: dict, machine_name: str) -> Compared:
    """One row of the file. Raises MacsError for one without the fields above."""
    try:
        case, measured = row["case"], row["measured"]
        model = replace(
            MODELS["qwen3-vl-30b-a3b"], hidden=case["H"], intermediate=case["I"], experts=case["E"], name="measured"
        )
        cluster = Cluster(MACHINES[machine_name], model, case["ranks"], tokens=0, fp8=case["dtype"] == "fp8")
        predicted = [
            float(expert_us(np.array(case[name], float).reshape(case["E"]), cluster).max()) for name, _ in FORMS
        ]
        name = (
            f"R{case['ranks']} E{case['E']} H{case['H']} I{case['I']} {case['dtype']}, {int(np.sum(case['rows']))} rows"
        )
        return Compared(name, tuple(predicted), tuple(float(measured[key]) for _, key in FORMS))
    except (KeyError, TypeError, ValueError) as error:
        raise MacsError("straggler row", repr(error), "the fields that this script's docstring names") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="docs/results/straggler.json")
    parser.add_argument("--machine", choices=list(MACHINES), default="h200")
    parser.add_argument("--most", type=float, default=None, help="exit 1 if the mean error of the speed-up is larger")
    options = parser.parse_args()
    try:
        with open(options.file, encoding="utf-8") as file:
            rows = [row for row in json.load(file)["rows"] if row.get("op") == "straggler"]
        compared = [compare(row, options.machine) for row in rows]
    except (OSError, ValueError, KeyError) as error:  # MacsError is a ValueError
        print(f"check_simulation: {error}", file=sys.stderr)
        return 2
    if not compared:
        print(f"check_simulation: no straggler rows in {options.file}", file=sys.stderr)
        return 2
    for c in compared:
        pairs = zip(c.predicted, c.measured, strict=True)
        times = "   ".join(f"{p:7.0f} us against {m:7.0f}" for p, m in pairs)
        print(f"{c.case:<48} {times}   time {c.time_error:+.1%}   speed-up {c.speedup_error:+.1%}")
    mean = float(np.mean([abs(c.speedup_error) for c in compared]))
    print(f"mean error: time {np.mean([abs(c.time_error) for c in compared]):.1%}, speed-up {mean:.1%}")
    return 1 if options.most is not None and mean > options.most else 0


if __name__ == "__main__":
    sys.exit(main())

"""The evaluation in the form that all files of docs/results share: a header, and one row per policy, bound and task."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts" / "gpu"))

import result_file  # noqa: E402

PLACE_OPTIONS = ("--out", "--checkpoint", "--material")  # of whoever ran it


def header(device: str) -> dict[str, str]:
    """What ran, on what and when; the commit only where git is at hand."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "gpu": device,
        "commit": git.stdout.strip() or "unknown",
        "command": result_file.command_line(sys.argv, "lab", PLACE_OPTIONS),
        "date": datetime.now(UTC).date().isoformat(),
    }


def rows(result: dict) -> list[dict]:
    """Of the parts that compare methods, for the tasks that count and their mean.

    relative_accuracy and ci95 are over the unclipped model's accuracy; clipped is a share of all assignments.
    """
    found = []
    for part in ("main", "stress", "replicas"):
        if part not in result:
            continue
        measured, counts = result[part]["rows"], result.get("main", result[part])["mastered"]
        unclipped = next(row for row in measured if row["bound"] is None)["accuracy"]
        for row in measured:
            if row["bound"] is None:
                continue
            common = {"policy": row["method"], "bound": row["bound"]}
            rest = {"clipped": row["share"]["clipped"], "seeds": len(result["seeds"])}
            scores = {task: [x / unclipped[task][0] for x in row["accuracy"][task]] for task in counts}
            for task, (middle, *interval) in {"mean": row["kept"], **scores}.items():
                relative = {"relative_accuracy": round(middle, 5), "ci95": [round(x, 5) for x in interval]}
                found.append({**common, "task": task, **relative, **rest})
    return found

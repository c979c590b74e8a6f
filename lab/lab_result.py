"""The evaluation in the form of the files in docs/results: what ran, on what and when, and then its figures."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from tools import result_text

ROOT = Path(__file__).resolve().parents[1]

PLACE_OPTIONS = ("--out", "--checkpoint", "--material")  # of whoever ran it


def header(device: str) -> dict[str, str]:
    """What ran, on what and when; the commit only where git is at hand."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "gpu": device,
        "commit": git.stdout.strip() or "unknown",
        "command": result_text.command_line(sys.argv, "lab", PLACE_OPTIONS),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write(out: Path, result: dict) -> None:
    out.write_text(result_text.text({**header(result["device"]), **result}))

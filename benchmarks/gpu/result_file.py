"""How the measurements of benchmarks/gpu are written: what ran, on what and when, above the rows."""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from tools.result_text import PLACE_OPTIONS, command_line, text

__all__ = ["PLACE_OPTIONS", "add_options", "command_line", "gpu_name", "text", "write"]


def add_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--out and --commit, as every script that measures takes them."""
    parser.add_argument("--out", required=required, help="JSON file to write")
    parser.add_argument("--commit", default="unknown", help="of the sources, where git is not at hand")


def gpu_name() -> str:
    """Of the first GPU, from nvidia-smi: no CUDA context is made."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    return names[0].strip()


def write(out: Path | str, rows: list[dict], *, commit: str, gpus: int = 1, **more: object) -> None:
    """One file of docs/results; `more` stands between the header and the rows."""
    result = {
        "gpu": gpu_name() + (f" x {gpus}" if gpus > 1 else ""),
        "commit": commit,
        "command": command_line(sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        **more,
        "rows": rows,
    }
    Path(out).write_text(text(result))

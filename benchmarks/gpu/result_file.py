"""How the measurements of benchmarks/gpu are written: what ran, on what and when, above the rows."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

# Where a run's files lie, what it is called, which of its processes writes and when it begins: not what it measures.
PLACE_OPTIONS = ("--out", "--commit", "--rank", "--init", "--go")


def add_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--out and --commit, as every script that measures takes them."""
    parser.add_argument("--out", required=required, help="JSON file to write")
    parser.add_argument("--commit", default="unknown", help="of the sources, where git is not at hand")


def command_line(argv: list[str], package: str = "benchmarks.gpu", places: tuple[str, ...] = PLACE_OPTIONS) -> str:
    """The command as somebody would type it, without the options `places`; package: the program's."""
    kept, skip = [], False
    for word in argv[1:]:
        if not skip and word not in places:
            kept.append(f"'{word}'" if " " in word else word)
        skip = not skip and word in places
    return " ".join(["python3", "-m", f"{package}.{Path(argv[0]).stem}", *kept])


def gpu_name() -> str:
    """Of the first GPU, from nvidia-smi: no CUDA context is made."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    return names[0].strip()


def text(result: dict) -> str:
    """JSON with a line for each entry, and for each row of a list: short, and a diff shows which rows changed."""

    def line(value: object) -> str:
        return json.dumps(value, separators=(",", ":"))

    def entry(value: object) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(line(row) for row in value) + "\n]"
        return line(value)

    return "{\n" + ",\n".join(f"{line(name)}:{entry(value)}" for name, value in result.items()) + "\n}\n"


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

"""What the tables of the documentation are made of: files of docs/results, and Markdown."""

import json
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def results(name: str) -> dict:
    """One file of docs/results."""
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def matching(pattern: str) -> list[dict]:
    """All files of docs/results of such names, in their order."""
    return [results(path.stem) for path in sorted((ROOT / "docs" / "results").glob(f"{pattern}.json"))]


def only(pattern: str) -> str:
    """The one file of docs/results of that name, whichever GPU it names."""
    (path,) = (ROOT / "docs" / "results").glob(f"{pattern}.json")
    return path.stem


def source(found: dict) -> str:
    """Where figures come from, in one line."""
    return f"{found['gpu']}, {found['date']}, commit {found['commit'][:9]}, `{found['command']}`."


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header), ["---"] * len(list(header)), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)

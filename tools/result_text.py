"""What a result file of benchmarks or the lab is made of: the command that was run, and JSON whose diff can be read."""

from __future__ import annotations

import json
from pathlib import Path

# Where a run's files lie, what it is called, which of its processes writes and when it begins: not what it measures.
PLACE_OPTIONS = ("--out", "--commit", "--rank", "--init", "--go")


def command_line(argv: list[str], package: str = "benchmarks.gpu", places: tuple[str, ...] = PLACE_OPTIONS) -> str:
    """The command as somebody would type it, without the options `places`; package: the program's."""
    kept, skip = [], False
    for word in argv[1:]:
        if not skip and word not in places:
            kept.append(f"'{word}'" if " " in word else word)
        skip = not skip and word in places
    return " ".join(["python3", "-m", f"{package}.{Path(argv[0]).stem}", *kept])


def text(result: dict) -> str:
    """JSON with a line for each entry, and for each row of a list: short, and a diff shows which rows changed."""

    def line(value: object) -> str:
        return json.dumps(value, separators=(",", ":"))

    def entry(value: object) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(line(row) for row in value) + "\n]"
        return line(value)

    return "{\n" + ",\n".join(f"{line(name)}:{entry(value)}" for name, value in result.items()) + "\n}\n"

"""All that measures, by name: `python -m benchmarks.run` lists it, `python -m benchmarks.run NAME OPTIONS` runs it."""

import ast
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def programs() -> dict[str, Path]:
    """By name, what can be run: in this folder, in gpu/ (one machine with GPUs) and in e2e/ (whole servers)."""
    files = [path for folder in (".", "gpu", "e2e") for path in sorted((HERE / folder).glob("*.py"))]
    measuring = [path for path in files if path != Path(__file__).resolve() and not path.stem.startswith("plot")]
    return {
        path.relative_to(HERE).with_suffix("").as_posix(): path
        for path in measuring
        if "__main__" in path.read_text(encoding="utf-8")
    }


def summary(path: Path) -> str:
    """The first sentence of what a program says of itself, in one line."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".")


def main(argv: list[str]) -> int:
    found = programs()
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, found))
        print(__doc__, *(f"  {name:{width}}  {summary(path)}" for name, path in found.items()), sep="\n")
        return 0
    if argv[0] not in found:
        print(f"benchmarks.run: got {argv[0]}, expected one of {', '.join(found)}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    module = f"benchmarks.{argv[0].replace('/', '.')}"
    os.execv(sys.executable, [sys.executable, "-m", module, *argv[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Writes the README's flag table from the fields of MacsConfig; `--check` only compares."""

import sys
from pathlib import Path

from sglang_macs.config import flag_table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- flags: written by make format -->", "<!-- /flags -->"


def with_table(text: str) -> str:
    """The README with the current table between its markers."""
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{flag_table()}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        if text != with_table(text):
            print("README.md: the flag table differs from MacsConfig. Run: make format", file=sys.stderr)
            return 1
        return 0
    README.write_text(with_table(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

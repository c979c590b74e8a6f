"""What a serving process says: one line on stderr."""

import sys
from contextlib import suppress
from functools import cache


def say(line: str) -> None:
    """Never raises: stderr may be a file on a full disk, or a pipe that nobody reads any more."""
    with suppress(OSError, ValueError):
        print(f"sglang-macs: {line}", file=sys.stderr, flush=True)


say_once = cache(say)  # each line once for the process

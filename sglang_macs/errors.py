"""Errors a user can act on: what was wrong, what was got, what was expected, and the fix."""

MOST_SHOWN = 400  # characters of what was got


def printable(text: object, most: int = MOST_SHOWN) -> str:
    """`text` on one line of at most `most` characters, safe for a terminal and a log: control characters, escape
    sequences' first bytes among them, become `?`.
    """
    try:
        text = str(text)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    cut = text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in cut)


class MacsError(ValueError):
    """Bad configuration, profile or combination of flags. `str(error)` is one printable line."""

    def __init__(self, what: str, got: object, expected: object, fix: str = "") -> None:
        line = f"{what}: got {printable(got)}, expected {expected}." + (f" {fix}" if fix else "")
        super().__init__(printable(line, 4 * MOST_SHOWN))


class MacsNotActive(RuntimeError):
    """MACS was asked for, but a hook did not take: serving on would silently serve without it."""

"""Errors a user can act on: what was wrong, what was got, what was expected, and the fix."""


class MacsError(ValueError):
    """Bad configuration, profile or combination of flags. `str(error)` is one line."""

    def __init__(self, what: str, got: object, expected: str, fix: str = "") -> None:
        super().__init__(f"{what}: got {got}, expected {expected}." + (f" {fix}" if fix else ""))


class MacsNotActive(RuntimeError):
    """MACS was asked for, but a hook did not take: serving on would silently serve without it."""

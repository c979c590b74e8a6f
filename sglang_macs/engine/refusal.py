"""Ends a process with one line where MACS refuses: SGLang would make a page of traceback of it."""

from functools import wraps

from ..console import say
from ..errors import MacsError, MacsNotActive


def exit_with(error: Exception) -> None:
    """One line on stderr, and status 2."""
    say(str(error))
    raise SystemExit(2) from error


def or_exit(function):
    """`function`, which ends the process with one line where it refuses."""

    @wraps(function)
    def refusing(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (MacsError, MacsNotActive) as error:
            exit_with(error)

    return refusing

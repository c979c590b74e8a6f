"""Which cases `make test` leaves to `make test-all`."""

from collections.abc import Iterable

import pytest


def nightly_but(cases: Iterable[str], *always: str) -> list:
    """Parameters of a test, those not in `always` marked nightly. Raises ValueError for a name that is no case."""
    cases = list(cases)
    if unknown := set(always) - set(cases):
        raise ValueError(f"no such case: {', '.join(sorted(unknown))}")
    return [case if case in always else pytest.param(case, marks=pytest.mark.nightly) for case in cases]

"""`sglang-macs doctor URL`: what a running server's counters say of it."""

from collections.abc import Iterator

from ..errors import printable
from ..observe.server_info import Server, missing_ranks
from ..observe.verdict import verdict
from .checks import FAIL, OK, SKIP, WARN, Check


def examine(server: Server) -> Iterator[Check]:
    """Every check, in order. Raises MacsError where no server with MACS answers."""
    states = server.states()
    first = states[0]
    config = first.get("config") if isinstance(first.get("config"), dict) else {}
    found = (
        f"sglang-macs {first.get('version', '?')}, preset {config.get('preset', '?')}, gamma {config.get('gamma', '?')}"
    )
    missing = missing_ranks(states)
    fix = "Its counters are in no answer: look at that node's log." if missing else ""
    yield Check("server", WARN if missing else OK, printable(f"{found}{f'; {missing}' if missing else ''}"), fix)
    yield _claims(states)
    line = verdict(states)
    yield Check("imbalance", SKIP if line.startswith("imbalance:") else OK, line)


def _claims(states) -> Check:
    checks, violations = (
        sum(n for state in states for n in (state.get(key) or {}).values() if isinstance(n, int))
        for key in ("checks", "violations")
    )
    unmasked = sum(n for state in states if isinstance(n := state.get("misaligned"), int))
    found = f"{checks} claims checked, {violations} violated; {unmasked} plans without a mask"
    bad = bool(violations or unmasked)
    fix = "Turn it off (sglang-macs set URL --off), and report it." if bad else ""
    return Check("proof", FAIL if bad else OK, found, fix)

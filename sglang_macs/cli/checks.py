"""What `sglang-macs doctor` finds: a check, its status, and all of them in words."""

import dataclasses

OK, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "skip"


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding. status: OK, FAIL, WARN where MACS would serve and not pay, or SKIP where it does not apply; fix:
    what to do, for a FAIL or a WARN, or what it would take, for a SKIP.
    """

    name: str
    status: str
    found: str
    fix: str = ""


def checked(name: str, ok: bool, found: str, fix: str) -> Check:
    """OK, or FAIL with its fix."""
    return Check(name, OK if ok else FAIL, found, "" if ok else fix)


def report(checks: list[Check]) -> str:
    """The checks for a person: hooks that took are one line."""
    lines, took = [], [c for c in checks if c.name.endswith(" hook") and c.status == OK]
    for check in checks:
        if check not in took:
            lines.append(f"{check.status:<5} {check.name:<22} {check.found}")
            lines += [f"      fix: {check.fix}"] if check.fix else []
        elif check is took[0]:
            lines.append(f"{OK:<5} {'hooks':<22} {len(took)} took")
    failed = sum(check.status == FAIL for check in checks)
    warned = sum(check.status == WARN for check in checks)
    ready = f"Ready to serve with MACS; {warned} to look at" if warned else "Ready to serve with MACS"
    verdict = f"{failed} of {len(checks)} checks failed" if failed else ready
    return "\n".join([*lines, "", f"{verdict}."])

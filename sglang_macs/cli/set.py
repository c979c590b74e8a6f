"""`sglang-macs set URL --gamma 1.05`: changes options of a running server, on all ranks before the same pass."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .. import control
from ..choices import IMPORTANCES
from ..config import PRESETS
from ..errors import MacsError, printable
from ..observe.server_info import Server, applied, changes, refusal
from .arguments import add_admin, add_server, admin_of, gamma, number, server_of

HELP = "change options of a running server, off and on among them, without a restart"
SECONDS_BETWEEN = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="the server")
    power = parser.add_mutually_exclusive_group()
    power.add_argument("--off", action="store_true", help="nothing is planned from the next pass on: the kill switch")
    power.add_argument("--on", action="store_true", help="back to the options that were in force before --off")
    power.add_argument("--preset", choices=sorted(PRESETS), help="with its own options; the launch's with the launch's")
    count = number(int, 0, 1 << 31)
    parser.add_argument("--gamma", type=gamma, help="capacity factor; inf = never clip")
    parser.add_argument("--importance", choices=IMPORTANCES, help="what is clipped last")
    parser.add_argument("--min-tokens", type=count, metavar="N", help="act on batches of so many tokens per rank")
    parser.add_argument("--verify", choices=("true", "false"), help="recount the rows after every plan")
    parser.add_argument("--verify-every", type=count, metavar="N", help="recount in one of so many passes; 0 = never")
    parser.add_argument(
        "--trace", choices=("on", "off"), help="record into the launch's --macs-trace folder, or do not"
    )
    wait = number(float, 0, 3600)
    parser.add_argument("--wait", type=wait, default=5.0, help="seconds for the next pass (default: %(default)s)")
    add_server(parser)
    add_admin(parser)


def run(args: argparse.Namespace) -> int:
    options = requested(args)
    if not options:
        raise MacsError("set", "no option", "one to change, such as --gamma 1.05 or --off")
    server = server_of(args.url, args)
    admin = admin_of(server, args)
    before = server.states()
    if not admin.change(control.encode(options)):
        print(f"sglang-macs set: refused, {refusal(server.states())}", file=sys.stderr)
        return 2
    print(outcome(before, _settled(server, args.wait)))
    return 0


def requested(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the arguments change, for `control.encode`."""
    names = ("preset", "gamma", "importance", "min_tokens", "verify", "verify_every", "trace")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return {"preset": "off"} | given if args.off else {"on": True} | given if args.on else given


def _settled(server: Server, seconds: float) -> list[dict[str, Any]]:
    """The states once every rank that answers has applied what it received, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        states = server.states()
        if all(applied(state) for state in states) or time.monotonic() >= deadline:
            return states
        time.sleep(SECONDS_BETWEEN)


def outcome(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> str:
    """In one line, what has changed or will."""
    if not all(applied(state) for state in after):
        return "received; it takes effect before the next pass, which an idle server has not had yet"
    old, new = (states[0].get("config") for states in (before, after))
    words = []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        words = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    made = changes(after[0])
    last = made[-1][1] if made else "?"
    return printable(f"{', '.join(words) or 'nothing else than before'}; on all ranks from pass {last} on")

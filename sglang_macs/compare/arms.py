"""The arms of a comparison: one server that is switched while it runs, or two servers as they are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import control
from ..config import OFF
from ..errors import MacsError
from ..observe.server_info import Server, State, applied, refusal

ARMS = ("off", "again", "on")  # "again" is off once more: with "off" it makes the noise floor


@dataclass(frozen=True)
class Clipped:
    """Assignments that were planned, and of these clipped, since a server's start, by its ranks that answer."""

    assignments: int
    clipped: int

    def since(self, before: "Clipped") -> "Clipped":
        return Clipped(self.assignments - before.assignments, self.clipped - before.clipped)


def clipped(states: Sequence[State]) -> Clipped:
    own = [state["own"] for state in states if isinstance(state.get("own"), Mapping)]
    sums = (
        sum(n for one in own for name, n in one.items() if name.startswith(kind) and type(n) is int)
        for kind in ("assignments", "clipped")
    )
    return Clipped(*sums)


class TwoServers:
    """`base` for off, `other` for on, as they are."""

    switched = False

    def __init__(self, base: Server, other: Server) -> None:
        self.base, self.other = base, other

    def take(self, arm: str) -> Server:
        return self.other if arm == "on" else self.base

    def counters(self, arm: str) -> Clipped | None:
        """None where the server has none: it may be without MACS."""
        try:
            return clipped(self.take(arm).states())
        except MacsError:
            return None


class OneServer:
    """A server that is turned off and on; a context manager that leaves it with the options it had.

    Args:
        server: for requests and counters; admin: the same, for changes.
        gamma: of "on", or None for the server's own.
        own: what an earlier run found, that was killed and could not put it back; None: what is in force.
        ask_once: has the server run a pass, so that a change takes effect.
    """

    switched = True

    def __init__(
        self,
        server: Server,
        admin: Server,
        gamma: float | None,
        own: Mapping[str, Any] | None,
        ask_once: Callable[[], None],
    ) -> None:
        self.server, self._admin, self._gamma, self._ask_once = server, admin, gamma, ask_once
        self._arm = ""
        self.own: dict[str, Any] = dict(own or {})

    def __enter__(self) -> "OneServer":
        if not self.own:
            preset = _config(self.server.states()).get("preset")
            try:
                if preset in OFF:  # what --on brings back is not shown while it is off
                    self._change({"on": True})
                    self._ask_once()
                self.own = {"preset": preset, "gamma": _config(self.server.states()).get("gamma")}
            finally:
                if preset in OFF:
                    self._change({"preset": preset})
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._change({"on": True, "gamma": self.own["gamma"]})
            if self.own["preset"] in OFF:
                self._change({"preset": self.own["preset"]})
        except (MacsError, KeyboardInterrupt) as failed:
            off = f", then --preset {self.own['preset']}" if self.own["preset"] in OFF else ""
            command = f"sglang-macs set {self.server.url} --on --gamma {self.own['gamma']}{off}"
            raise MacsError("server", f"it not put back ({failed})", "the options it had", f"Run: {command}") from error

    def take(self, arm: str) -> Server:
        """The server, in that arm from its next pass on."""
        wanted = "on" if arm == "on" else "off"
        if wanted != self._arm:
            gamma = {} if self._gamma is None else {"gamma": self._gamma}
            self._change({"on": True, **gamma} if wanted == "on" else {"preset": "off"})
            self._arm = wanted
        return self.server

    def counters(self, arm: str) -> Clipped:
        return clipped(self.server.states())

    def check(self, arm: str) -> None:
        """Raises MacsError if, behind a pass, the server is not in that arm: somebody else has changed it."""
        for state in self.server.states():
            config = _config([state])
            wrong = (config.get("preset") in OFF) == (arm == "on")
            if arm == "on" and self._gamma is not None:
                wrong = wrong or not math.isclose(float(config.get("gamma", math.nan)), self._gamma)
            if wrong or not applied(state):
                got = f"preset {config.get('preset')}, gamma {config.get('gamma')} while MACS was to be {arm}"
                raise MacsError("server", got, "nobody else to change it", "Begin again.")

    def _change(self, options: Mapping[str, Any]) -> None:
        if not self._admin.change(control.encode(options)):
            words = ", ".join(f"{name}={value}" for name, value in options.items())
            raise MacsError("server", f"{words} refused: {refusal(self.server.states())}", "options that it takes")


def _config(states: Sequence[State]) -> Mapping[str, Any]:
    found = states[0].get("config")
    return found if isinstance(found, Mapping) else {}

"""Options that change while a server serves: `POST /set_internal_state`, admin-gated as SGLang's own are.

A pass is collective, so a change takes effect before the same pass on every rank. Requests come to all schedulers in
one order, but with attention data-parallel not at one time. Before each pass these tell each other how many tokens they
have (`MLPSyncBatchInfo`), and beside it how many requests they have received. The least of these numbers is what every
rank has: up to there requests are applied, before that pass, on all of them. Ranks that run the same batches
(attention-TP) get requests by SGLang's own broadcast, at the same pass.
"""

from collections import deque
from collections.abc import Callable, Mapping

from .. import control
from ..console import say
from ..control import Settings
from ..errors import MacsError, MacsNotActive

KEPT = 16  # changes whose passes are shown


class Control:
    """Of one process. A request that is refused counts as received and changes nothing, as on all ranks.

    Args:
        settings: of the launch.
        check: raises MacsError or MacsNotActive for settings that this launch does not take.
        apply: puts settings in force; is told the number of the request.
    """

    def __init__(
        self, settings: Settings, check: Callable[[Settings], None], apply: Callable[[int, Settings], None]
    ) -> None:
        self.settings = settings  # in force
        self.received = self.applied = 0
        self.refused = ""  # why, of the last request that was
        self._check, self._apply = check, apply
        self._newest = settings  # of what was received
        self._waiting: deque[Settings | None] = deque()  # None: refused
        self._passes = 0
        self._changes: deque[tuple[int, int]] = deque(maxlen=KEPT)  # request, and pass before which it was applied

    def receive(self, server_args: Mapping[str, float]) -> bool:
        """One request; False if it is refused."""
        self.received += 1
        try:
            changed = self._newest.changed(control.decode(server_args))
            self._check(changed)
        except (MacsError, MacsNotActive) as error:
            self.refused = str(error)
            self._waiting.append(None)
            say(f"options stay as they are, request {self.received}: {error}")
            return False
        self._newest = changed
        self._waiting.append(changed)
        return True

    def begin_pass(self, agreed: int) -> None:
        """Before each pass of a scheduler, with the number of requests that all ranks have received."""
        while self._waiting and self.applied < agreed:
            self.applied += 1
            changed = self._waiting.popleft()
            if changed is not None:
                words = control.difference(self.settings, changed)
                self.settings = changed
                self._changes.append((self.applied, self._passes))
                self._apply(self.applied, changed)
                say(f"options changed by request {self.applied} before pass {self._passes}: {words}")
        self._passes += 1

    def state(self) -> dict[str, object]:
        """For `GET /server_info`."""
        return {
            "received": self.received,
            "applied": self.applied,
            "refused": self.refused,
            "traced": self.settings.traced,
            "changes": [list(change) for change in self._changes],
        }

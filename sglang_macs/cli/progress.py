"""Signs of life on stderr from a command that takes longer than a person likes to wait for a first word."""

import threading
import time
from types import TracebackType

from ..console import say

EVERY_SECONDS = 3.0  # an import of torch lets no other thread run for a second and more


class Progress:
    """Within, says every few seconds what is being done.

    now: what that is, in words; whoever works changes it.
    """

    def __init__(self, name: str, every: float = EVERY_SECONDS) -> None:
        self.now, self._name, self._every = "starting", name, every
        self._over = threading.Event()

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._say, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _say(self) -> None:
        while not self._over.wait(self._every):
            say(f"{self._name}: {self.now}, {time.monotonic() - self._began:.0f} s")

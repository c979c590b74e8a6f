"""Waiting for what another process or thread does, however busy the machine."""

import time
from collections.abc import Callable


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.05)

"""Runs in every process of a server that a test starts: its processes share one import of SGLang.

SGLang starts its schedulers, their controller and the detokenizer by "spawn", so that each imports SGLang anew: 9 s of
a core, five times a server. On a CPU nothing stands against "fork", which keeps the parent a process is watched by. At
that time the launcher has run no parallel code, and has no sockets. What users start is not touched, nor is what
tests start as users would (`servers.as_users_do`).
"""

import multiprocessing
import os
import sys

_set_start_method = multiprocessing.set_start_method


def _fork(method: str | None, force: bool = False) -> None:
    _set_start_method("fork" if method == "spawn" else method, force)


def _load_plugins_again() -> None:
    """A scheduler has hooks of its own; SGLang would take its parent's for all there are."""
    if (plugins := sys.modules.get("sglang.srt.plugins")) is not None:
        plugins._plugins_loaded = False


multiprocessing.set_start_method = _fork
os.register_at_fork(after_in_child=_load_plugins_again)

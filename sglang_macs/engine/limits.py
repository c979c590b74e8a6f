"""Which options a running server takes: what would be refused at a launch, and what the launch has settled."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ..control import Settings
from ..errors import MacsError, MacsNotActive
from . import compat

if TYPE_CHECKING:
    from .worker import Worker


def check_change(process: Worker, settings: Settings) -> None:
    """Raises MacsError or MacsNotActive for settings that this process cannot go over to. Alike on all ranks."""
    config = settings.now
    if process.launch is not None:
        compat.check(replace(process.launch, config=config))
    if config.reroutes and process.cannot_reroute:
        raise MacsNotActive(process.cannot_reroute)
    if process.has_replicas and config.no_replicas:
        raise MacsError("replicas", config.no_replicas, "--macs-scope rank, --macs-load rows, --macs-exchange group")
    if process.bounded is not None:
        _check_buffers(settings)


def _check_buffers(settings: Settings) -> None:
    """Without a count on the host, memory was set aside for the bound of the launch. Without one there are others."""
    now, launch = settings.now.gamma, settings.launch.gamma
    if launch < now < math.inf:
        expected = f"at most the launch's {launch:g} where no count goes to the host, or inf"
        raise MacsError("gamma", f"{now:g}", expected, "Launch it with the larger one.")

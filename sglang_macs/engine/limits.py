"""Which options a running server takes: what would be refused at a launch, and what the launch has settled."""

import math
from dataclasses import replace

from ..control import Settings
from ..errors import MacsError, MacsNotActive
from . import compat
from .launch import Launch


def check_change(
    settings: Settings, launch: Launch | None, *, cannot_reroute: str, has_replicas: bool, is_bounded: bool
) -> None:
    """Raises MacsError or MacsNotActive for settings that a process cannot go over to. Alike on all ranks.

    launch: what SGLang and the model said, None before they have. cannot_reroute: why not, or empty. has_replicas:
    whether plans choose among them. is_bounded: whether it dispatches without a count on the host.
    """
    config = settings.now
    if launch is not None:
        compat.check(replace(launch, config=config))
    if config.reroutes and cannot_reroute:
        raise MacsNotActive(cannot_reroute)
    if has_replicas and config.no_replicas:
        raise MacsError("replicas", config.no_replicas, "--macs-scope rank, --macs-load rows, --macs-exchange group")
    if is_bounded:
        _check_buffers(settings)


def _check_buffers(settings: Settings) -> None:
    """Without a count on the host, memory was set aside for the bound of the launch. Without one there are others."""
    now, launch = settings.now.gamma, settings.launch.gamma
    if launch < now < math.inf:
        expected = f"at most the launch's {launch:g} where no count goes to the host, or inf"
        raise MacsError("gamma", f"{now:g}", expected, "Launch it with the larger one.")

"""A scheduler process: its entry, its hooks, and the check that every one of them took.

SGLang logs and swallows exceptions of plugins and hooks, and would serve on without MACS.
"""

import os

from ..config import MacsConfig, configure
from ..errors import MacsNotActive
from ..observe import recorder
from . import (
    deepep,
    deepep_bounded,
    dispatchers,
    exempt,
    hooks,
    model_runner,
    prefix_cache,
    replicas,
    runner,
    scheduler,
    set_state,
    topk,
)
from .refusal import exit_with

HOOKS = tuple(
    hook
    for module in (
        *(topk, dispatchers, replicas, model_runner, scheduler, set_state, exempt, prefix_cache),
        *(deepep, deepep_bounded, runner),
    )
    for hook in module.HOOKS
)
here = False  # whether this process is one: the launcher must not import the model stack


def run_scheduler_process(config: dict[str, object], run: str, *args, **kwargs):
    """Entry of a scheduler process: hooks applied and checked, then SGLang's own entry.

    config: `MacsConfig.to_json` of the server that this process belongs to; run: the name of its start, for a trace.
    """
    from sglang.srt.plugins import load_plugins

    global here
    here = True
    configure(MacsConfig.from_json(config))
    os.environ[recorder.RUN_ENV] = run
    load_plugins()
    try:
        hooks.check((*HOOKS, *hooks.registered))
    except MacsNotActive as error:
        exit_with(error)
    from sglang.srt.managers.scheduler import run_scheduler_process as entry

    return entry(*args, **kwargs)

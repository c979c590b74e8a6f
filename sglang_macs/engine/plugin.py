"""The SGLang plugin: registers the hooks of the process that it is in, and tries them for `sglang-macs doctor`.

Those are the launcher's (launcher.py) or, in a scheduler that was started with a configuration, those of
scheduler_process.py; without one nothing is hooked on the model side. docs/design/hooks.md says why each
target is hooked.
"""

import os
from typing import Any

from .. import cpu_compat
from ..config import MacsConfig, configure, configured
from ..errors import MacsError
from . import hooks, launcher, runner, scheduler_process
from .refusal import exit_with


def register() -> None:
    """Called by the entry point (entry_point.py), once in the launcher and in every scheduler process."""
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES, add_moe_runner_backend_choices

    if runner.RUNNER not in MOE_RUNNER_BACKEND_CHOICES:
        add_moe_runner_backend_choices([runner.RUNNER])
    if not scheduler_process.here:
        hooks.register_all(launcher.HOOKS)
    elif configured() is not None:
        runner.register()
        if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
            cpu_compat.register(hooks.register, hooks.define_missing)
        else:
            cpu_compat.register_idle_mrope(hooks.register)
        hooks.register_all(scheduler_process.HOOKS)


def probe(side: str) -> dict[str, str]:
    """`sglang-macs doctor`, in a process of its own: "" or what is wrong, for every hook of the "launcher" or of a
    "scheduler".
    """
    from sglang.srt.plugins import load_plugins

    scheduler_process.here = side == "scheduler"
    if scheduler_process.here:
        configure(MacsConfig.from_preset())
    load_plugins()
    side_hooks = (*scheduler_process.HOOKS, *hooks.registered) if scheduler_process.here else launcher.HOOKS
    return {hook.target: hooks.trouble(hook) for hook in side_hooks}


def try_launch(argv: list[str]) -> dict[str, Any]:
    """Resolves a server's flags as its launcher would, after `probe("launcher")`. Ends the process where that would.
    Returns those that `sglang-macs doctor` looks at.
    """
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.server_args import prepare_server_args

    record = prepare_server_args(argv)
    record.resolve_once()
    if launcher.config_of(record) is None:
        exit_with(MacsError("server flags", "none that turn MACS on", "MACS", "Add --moe-a2a-backend macs."))
    flags = resolved_view(record)
    shown = ("device", "dp_size", "enable_dp_attention", "chunked_prefill_size")
    shown += ("enable_eplb", "ep_num_redundant_experts", "init_expert_location")
    return {name: getattr(flags, name) for name in shown}

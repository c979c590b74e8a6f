"""The launcher: MACS's flags, what they make of SGLang's, and what is refused.

It loads plugins, parses flags (`_from_cli_args`, `_engine_args`) and resolves them (`_resolve_once`): MACS becomes a
backend that SGLang knows, and is refused if a flag or the model rules it out. The configuration stays with SGLang's
record of the server: two engines of one process each have their own, or none. Schedulers are started with it
(`_launch_scheduler_processes`).
"""

import argparse
from functools import partial
from typing import Any

from .. import ops
from ..config import MacsConfig, add_flags, configure, configured, flag, from_options, given_options
from ..console import say
from ..errors import MacsError, MacsNotActive
from ..observe import recorder
from ..plan import importance, profile
from . import compat, deepep_v2, dispatch_choice, hooks, moe_config, runner
from .hooks import Hook
from .launch import V2
from .refusal import exit_with
from .scheduler_process import run_scheduler_process


class _EnableMacs(argparse._StoreTrueAction):
    """A switch that looks at the launcher's hooks itself: with the other ones missing, nobody else would read it.

    Of the class that SGLang's --config files take for a switch.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            hooks.check(HOOKS)
        except MacsNotActive as error:
            exit_with(error)
        super().__call__(parser, namespace, values, option_string)


def _add_cli_args(result, parser):
    """AFTER ServerArgs.add_cli_args: `macs` as a choice of backend, and MACS's own flags."""
    for action in parser._actions:
        if "--moe-a2a-backend" in action.option_strings and "macs" not in action.choices:
            action.choices = [*action.choices, "macs"]
    add_flags(parser)
    parser.add_argument("--enable-macs", action=_EnableMacs, help="bound the expert-parallel load with MACS")


def _is_asked(options: dict[str, Any], backend: str) -> bool:
    """Whether a command line's or an engine's options ask for MACS. Raises MacsError, MacsNotActive."""
    given = next(iter(given_options(options)), None)
    if not (options.get("enable_macs") or backend == "macs"):
        if given is not None:
            what, expected = flag(given.removeprefix("macs_")), "it beside every --macs- flag"
            raise MacsError(what, "no --enable-macs", expected, "Add --enable-macs.")
        return False
    hooks.check(HOOKS)
    compat.check_a2a(backend)
    return True


def _from_cli_args(original, cls, args):
    """AROUND ServerArgs.from_cli_args: flags -> what the record carries; SGLang never sees `macs`."""
    options = vars(args)
    try:
        config = from_options(options) if _is_asked(options, args.moe_a2a_backend) else None
    except (MacsError, MacsNotActive) as error:
        exit_with(error)
    record = original(cls, args)
    if config is not None:
        record._macs_config, record._macs_from_cli = config.to_json(), True
    return record


def _engine_args(original, **kwargs):
    """AROUND Engine.server_args_class: `enable_macs` and `macs_*` beside SGLang's own arguments."""
    options = {name: kwargs.pop(name) for name in list(kwargs) if name == "enable_macs" or name.startswith("macs_")}
    asked = _is_asked(options, kwargs.get("moe_a2a_backend", "none"))
    record = original(**kwargs)
    if asked:
        record._macs_config = (from_options(options) if given_options(options) else _default_config()).to_json()
    return record


def _default_config() -> MacsConfig:
    return configured() or MacsConfig.from_preset()


def config_of(record) -> MacsConfig | None:
    """The configuration that SGLang's record of a server carries, or None: MACS was not asked for."""
    if record.moe_a2a_backend == "macs" and not hasattr(record, "_macs_config"):  # a record made by hand
        record._macs_config = _default_config().to_json()
    values = getattr(record, "_macs_config", None)
    return None if values is None else MacsConfig.from_json(values)


def _resolve_once(original, self):
    """AROUND ServerArgs.resolve_once: translate the backend before SGLang resolves, refuse what MACS cannot serve
    after.
    """
    if getattr(self, "_resolution_finished", False) or (config := config_of(self)) is None:
        return original(self)
    try:
        hooks.check(HOOKS)
        _translate(self)
        _serve(self, config.on(self.device))
        original(self)
        _serve(self, _check_launch(self, config_of(self)))
    except (MacsError, MacsNotActive) as error:
        if getattr(self, "_macs_from_cli", False):
            exit_with(error)
        raise


def _serve(record, config: MacsConfig) -> None:
    """What the server's schedulers are started with."""
    record._macs_config = config.to_json()
    if getattr(record, "_macs_from_cli", False):
        configure(config)  # this process serves nothing else: whatever it starts can read it


def _translate(record) -> None:
    """`macs` becomes the backend whose code paths SGLang takes: deepep on CUDA, the open `customized` on CPU."""
    if record.moe_a2a_backend == "customized":
        return  # a copy of a record that was translated before
    ops.check()
    compat.check_a2a(record.moe_a2a_backend)
    if record.device == "cpu":
        record.moe_a2a_backend = "customized"
    else:
        _translate_for_cuda(record)
    if record.ep_size == 1:
        record.ep_size = record.tp_size  # as SGLang does for DeepEP
    if record.moe_runner_backend == runner.RUNNER:
        runner.register_name()


def _translate_for_cuda(record) -> None:
    """DeepEP's dispatcher, planned; DeepGEMM's runner, the only one that takes DeepEP's formats in bf16."""
    if not ops.has_cuda():
        fix = "Build it where nvcc and a CUDA torch are, or serve with --device cpu."
        raise MacsError("sglang_macs._C", "no CUDA operators", "a build with CUDA for a GPU server", fix)
    if record.moe_a2a_backend == V2:
        deepep_v2.register_models()
    else:
        record.moe_a2a_backend = "deepep"
    if record.moe_runner_backend in ("auto", runner.RUNNER):
        record.moe_runner_backend = "deep_gemm"


def _check_launch(record, config: MacsConfig) -> MacsConfig:
    """What is served of `config`. Raises MacsError for a launch that cannot be."""
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view

    model = model_config_of(record)
    launch = moe_config.launch_of(resolved_view(record), config, model)
    compat.check(launch)
    config, why = dispatch_choice.resolved(launch)
    if why:
        say(f"--macs-dispatch {launch.config.dispatch}: {config.dispatch}, {why}")
    if config.has_own_importance:
        importance.check(config.importance)
    if config.profile:
        of_model = profile.load(config.profile)
        of_model.check_model(launch.architecture, launch.num_experts)
        for layer in moe_config.layers(model.hf_text_config) or ():
            of_model.of_layer(layer)
    return config


def _launch_subprocesses(original, cls, server_args, *args, **kwargs):
    """AROUND Engine._launch_subprocesses: a kind of engine that starts schedulers in its own way (RayEngine) would
    start them without MACS.
    """
    ours = hooks.is_wrapped_by(cls._launch_scheduler_processes, _launch_scheduler_processes)
    if not ours and config_of(server_args) is not None:
        got = f"{cls.__name__}, which starts schedulers in its own way"
        raise MacsError("engine", got, "one whose schedulers load plugins (MACS)", "Use sglang.Engine.")
    return original(cls, server_args, *args, **kwargs)


def _launch_scheduler_processes(original, cls, server_args, port_args, run_scheduler_process_func, **kwargs):
    """AROUND Engine._launch_scheduler_processes: schedulers start through our own entry, which checks its hooks."""
    config, entry = config_of(server_args), run_scheduler_process_func
    if config is not None:  # one name for the trace files of all schedulers
        entry = partial(run_scheduler_process, config.to_json(), recorder.new_run())
    return original(cls, server_args, port_args, entry, **kwargs)


HOOKS = (
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", _add_cli_args, "after"),
    Hook("sglang.srt.server_args.ServerArgs.from_cli_args", _from_cli_args, "around"),
    Hook("sglang.srt.server_args.ServerArgs.resolve_once", _resolve_once, "around"),
    Hook("sglang.srt.entrypoints.engine.Engine.server_args_class", _engine_args, "class"),
    Hook("sglang.srt.entrypoints.engine.Engine._launch_subprocesses", _launch_subprocesses, "around"),
    Hook("sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes", _launch_scheduler_processes, "around"),
)

"""The one configuration: a frozen dataclass whose fields make the `--macs-*` flags, their help and the README's
table.
"""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .choices import BUCKETS, IMPORTANCES, LOADS, REROUTES, SCOPES
from .errors import MacsError

CONFIG_ENV = "SGLANG_MACS_CONFIG"
# Prefill tokens per rank from which on MACS pays, on GPUs (EP8, simulated: docs/guide/choosing.md) and on a CPU.
TOKENS_THAT_PAY = {"cuda": 2048, "cpu": 32}
# Rows off the most loaded rank from which on a plan pays on a CPU, for experts of a real model's size: there a row of
# 9 MFLOP takes a fifth of a millisecond, as much as the plan of a small batch. GPUs measure it (dispatch/plan_cost.py).
ROWS_THAT_PAY_ON_CPU = 8

PRESETS: dict[str, dict[str, object]] = {
    "rank": {
        "scope": "rank",
        "load": "rows",
        "importance": "gate",
        "reroute": "global",
    },
    "paper": {
        "scope": "expert",
        "load": "effective",
        "importance": "entropy",
        "reroute": "local",
        "alpha": 0.0,
        "act": "always",
    },
    "cai": {
        "scope": "expert",
        "load": "rows",
        "importance": "gate",
        "reroute": "none",
        "delta": 0.0,
        "rho": 0.0,
        "alpha": 0.0,
        "protect_text": False,
        "act": "always",
    },
    "off": {"gamma": math.inf},
    "observe": {"gamma": math.inf},
}
OFF = ("off", "observe")  # presets that plan nothing


def _opt(default: Any, help: str, choices: tuple[Any, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class MacsConfig:
    """Every option of the method; docs/design/method.md gives the formulas.

    Build one with `MacsConfig.from_preset`: what is given wins over the preset (`PRESETS`), and that over the defaults
    here. Raises MacsError for a value out of range.
    """

    preset: str = _opt(
        "rank",
        "starting point: rank, paper, cai, off, or observe: off, and counted what a bound would gain",
        tuple(PRESETS),
    )
    gamma: float = _opt(1.1, "capacity factor: a bound over the mean load, > 0; inf = never clip")
    scope: str = _opt("rank", "what is bounded: each rank, or each expert", SCOPES)
    load: str = _opt("rows", "what is counted: rows, or rows weighted by entropy (the paper's text)", LOADS)
    importance: str = _opt(
        "gate",
        "what is clipped last: high entropy weight, gate, or both; or MODULE:FUNCTION, a Python function of one's own",
        IMPORTANCES,
    )
    reroute: str = _opt("global", "where overflow may go before it is dropped", REROUTES)
    reroute_rounds: int = _opt(4, "passes over the overflow that look for room")
    exchange: str = _opt("group", "decide over the EP group with one all-reduce, or locally", ("group", "local"))
    delta: float = _opt(1.0, "steepness of the entropy weight, >= 0; 0 = all visual tokens weigh 0.5")
    rho: float = _opt(0.5, "how far capacity follows the modality mix, 0 <= rho < 2; needs a profile")
    alpha: float = _opt(1.0, "how far an overloaded expert loses importance (scope rank), 0 to 16")
    c_min: float = _opt(0.0, "rows per expert that capacity never falls below (scope expert)")
    entropy_scope: str = _opt(
        "batch", "tokens whose entropies are compared: the rank's batch, or each image", ("batch", "image")
    )
    protect_text: bool = _opt(True, "clip text only after all visual assignments of the bound")
    min_tokens: int | None = _opt(
        None, "act on prefill batches of so many tokens per rank, on average; None = 2048 on GPUs, 32 on a CPU"
    )
    decode: bool = _opt(False, "act on decode batches too")
    act: str = _opt(
        "auto", "plan a layer where that gains more than it costs (auto), or in every batch", ("auto", "always")
    )
    act_rows: int | None = _opt(
        None,
        "rows that a plan must be expected to take off the most loaded rank; None = measured at start-up on GPUs, 8 on "
        "a CPU",
    )
    buckets: int = _opt(128, "importance buckets; more = finer cut, larger exchange", BUCKETS)
    dispatch: str = _opt(
        "auto",
        "what carries batches: DeepEP; in low-latency mode, decode included, a kernel that plans and sends (fused); in "
        "normal mode DeepEP without a count on the host (bounded); auto = both, each where it can, auto_fused = the "
        "first alone where it can",
        ("auto", "deepep", "bounded", "fused", "auto_fused"),
    )
    layer_graphs: bool = _opt(True, "with bounded, a MoE layer is one launch, a CUDA graph")
    all_reduce: str = _opt(
        "auto",
        "what sums the exchange: the process group (NCCL), or one kernel over peers' memory; auto = that where it can",
        ("auto", "group", "peer"),
    )
    replicas: str = _opt(
        "balance",
        "where experts have copies on several ranks: choose among them so that ranks are even, before anything is "
        "clipped, or keep SGLang's choice",
        ("balance", "keep"),
    )
    exempt: bool = _opt(True, 'leave requests alone whose custom parameters say so: {"macs": "off"}')
    cache: str = _opt(
        "clipped",
        "what enters the prefix cache: all keys and values, or those alone of requests that nothing was clipped of "
        "(exact)",
        ("clipped", "exact"),
    )
    profile: str | None = _opt(None, "calibration profile (JSON): which experts serve which modality")
    verify: bool = _opt(False, "recount the group's rows after every plan: one more all-reduce, violations counted")
    verify_every: int = _opt(64, "without that, recount in one of so many planned passes; 0 = never")
    trace: str | None = _opt(None, "folder to record every plan into, for `sglang-macs report`")
    trace_limit_mb: float = _opt(64.0, "megabytes that each rank records at most")

    @classmethod
    def from_preset(cls, preset: str = "rank", **options: Any) -> "MacsConfig":
        """The preset with `options` over it, validated. Raises MacsError."""
        if not isinstance(preset, str) or preset not in PRESETS:
            raise MacsError("--macs-preset", _shown(preset), f"one of {', '.join(PRESETS)}")
        unknown = options.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise MacsError("MACS option", ", ".join(sorted(unknown)), "a field of MacsConfig")
        return cls(preset=preset, **{**PRESETS[preset], **options})

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if expected := _wrong_type(f, getattr(self, f.name)):
                raise MacsError(flag(f.name), _shown(getattr(self, f.name)), expected)
            own = f.name == "importance" and self.has_own_importance
            if not own and f.metadata["choices"] is not None and getattr(self, f.name) not in f.metadata["choices"]:
                raise MacsError(flag(f.name), repr(getattr(self, f.name)), f"one of {_listed(f.metadata['choices'])}")
        self._check_range("gamma", self.gamma > 0, "a number above 0", "inf turns clipping off.")
        self._check_range("rho", 0 <= self.rho < 2, "0 <= rho < 2", "From 2 on a capacity can become negative.")
        self._check_range("delta", 0 <= self.delta < math.inf, "a finite number >= 0")
        self._check_range("alpha", 0 <= self.alpha <= 16, "0 <= alpha <= 16")
        self._check_range("c_min", 0 <= self.c_min < math.inf, "a finite number of rows >= 0")
        self._check_range("reroute_rounds", 0 <= self.reroute_rounds <= 64, "0 to 64")
        if self.is_off and not math.isinf(self.gamma):
            raise MacsError("--macs-gamma", self.gamma, f"no gamma with --macs-preset {self.preset}", "Choose another.")
        self._check_range("trace_limit_mb", 0 < self.trace_limit_mb < 1e9, "megabytes above 0")
        self._check_range("min_tokens", self.min_tokens is None or self.min_tokens >= 0, "a number of tokens >= 0")
        self._check_range("act_rows", self.act_rows is None or self.act_rows >= 0, "a number of rows >= 0")
        self._check_range("verify_every", self.verify_every >= 0, "a number of passes >= 0")

    def _check_range(self, name: str, ok: bool, expected: str, fix: str = "") -> None:
        if not ok:  # NaN fails every comparison, and so ends here too
            raise MacsError(flag(name), getattr(self, name), expected, fix)

    def on(self, device: str) -> "MacsConfig":
        """With what depends on the device ("cuda", "cpu") decided. A server's ranks get this one."""
        on_cpu = device == "cpu"
        min_tokens, act_rows, dispatch, all_reduce = self.min_tokens, self.act_rows, self.dispatch, self.all_reduce
        if min_tokens is None:
            min_tokens = TOKENS_THAT_PAY["cpu" if on_cpu else "cuda"]
        if act_rows is None and on_cpu:
            act_rows = ROWS_THAT_PAY_ON_CPU
        if dispatch.startswith("auto") and (on_cpu or self.is_off):  # off is what others are compared with
            dispatch = "deepep"
        if all_reduce == "auto" and on_cpu:
            all_reduce = "group"
        return replace(self, min_tokens=min_tokens, act_rows=act_rows, dispatch=dispatch, all_reduce=all_reduce)

    @property
    def may_fuse(self) -> bool:
        """Whether a kernel of ours may carry low-latency batches."""
        return self.dispatch in ("auto", "fused", "auto_fused")

    @property
    def may_bound(self) -> bool:
        """Whether batches in normal mode may be carried without a count on the host."""
        return self.dispatch in ("auto", "bounded")

    def needs_entropy(self, has_profile: bool) -> bool:
        """Whether any decision depends on the entropies, given whether experts have a modality; if not, skip them."""
        by_entropy = self.importance in ("entropy", "entropy_gate")
        return self.delta > 0 and (by_entropy or self.load == "effective" or (self.rho > 0 and has_profile))

    @property
    def has_own_importance(self) -> bool:
        """Whether `importance` names a function, as MODULE:FUNCTION."""
        module, colon, function = self.importance.partition(":")
        return bool(colon) and all(part.isidentifier() for part in (*module.split("."), function))

    @property
    def is_off(self) -> bool:
        """Whether nothing is planned at all. (Infinite gamma plans, and finds nothing to clip.)"""
        return self.preset in OFF

    @property
    def observes(self) -> bool:
        """Whether it is counted what a bound would gain, beside passes in which nothing is planned."""
        return self.preset == "observe"

    @property
    def may_leave_layers(self) -> bool:
        """Whether a layer may be left alone for want of gain: not at infinite gamma, which plans to be counted, nor
        where ranks exchange nothing and so do not know the same loads.
        """
        return self.act == "auto" and not self.changes_nothing and self.exchange == "group"

    @property
    def no_replicas(self) -> str:
        """What keeps a plan from choosing among replicas, or ""."""
        for name, allowed in (("scope", ("rank",)), ("load", ("rows",)), ("exchange", ("group",))):
            if getattr(self, name) not in allowed:
                return f"{flag(name)} {getattr(self, name)}"
        if self.has_own_importance:
            return f"--macs-importance {self.importance}"
        return "--macs-reroute local" if self.reroute == "local" else ""

    @property
    def reroutes(self) -> bool:
        """Whether plans look for other experts."""
        return self.reroute != "none" and not self.changes_nothing

    @property
    def changes_nothing(self) -> bool:
        """Whether every assignment goes where it was routed: MACS is off, or gamma infinite."""
        return math.isinf(self.gamma)

    def to_json(self) -> dict[str, object]:
        """Plain values that `from_json` reads back; infinity as the string "inf"."""
        return {k: "inf" if v == math.inf else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: object) -> "MacsConfig":
        """Of what `to_json` gave. Raises MacsError for anything else."""
        if not isinstance(values, dict):
            raise MacsError("MACS options", _shown(values), "a JSON object of them")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := values.keys() - fields.keys():
            raise MacsError("MACS options", ", ".join(sorted(map(str, unknown))), "fields of MacsConfig")
        infinite = {k: math.inf for k, v in values.items() if v == "inf" and _type_of(fields[k]) == "float"}
        return cls(**{**values, **infinite})


# A scheduler process serves with what stands in one environment variable. In a program that starts engines it holds
# what an engine gets that asks for MACS without options; the engine itself carries its own (engine/launcher.py).


def configured() -> MacsConfig | None:
    """What `configure` was given in this process, or None. Raises MacsError if the environment holds what cannot be
    read.
    """
    raw = os.environ.get(CONFIG_ENV)
    if not raw:
        return None
    try:
        return MacsConfig.from_json(json.loads(raw))
    except (ValueError, RecursionError) as error:  # a MacsError, too: whoever reads it must know where the value stands
        fix = "Unset it: the flags and configure() write it."
        raise MacsError(CONFIG_ENV, f"{raw[:80]!r}... ({error})", "what configure() writes", fix) from error


def configure(config: MacsConfig | None) -> None:
    """What engines get that this process starts from now on with `moe_a2a_backend="macs"` and no `macs_*` option of
    their own; None: the default preset. Engines that do not ask for MACS stay without it.
    """
    if config is None:
        os.environ.pop(CONFIG_ENV, None)
    else:
        os.environ[CONFIG_ENV] = json.dumps(config.to_json())


def _type_of(f: dataclasses.Field) -> str:
    """bool, int, float, str, int | None, or str | None."""
    return getattr(f.type, "__name__", str(f.type))


def _wrong_type(f: dataclasses.Field, value: object) -> str:
    """What is expected where `value` is not of the field's type; "" where it is."""
    kind = _type_of(f)
    if kind == "bool":
        return "" if isinstance(value, bool) else "true or false"
    if kind == "int | None":
        kind = "int" if value is not None else "str | None"
    if kind in ("int", "float"):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        fits = whole or (kind == "float" and isinstance(value, float))
        return "" if fits else "a whole number" if kind == "int" else "a number"
    if kind == "str":
        return "" if isinstance(value, str) else "a name"
    return "" if value is None or (isinstance(value, str) and _is_path(value)) else "a path"


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _shown(value: object) -> str:
    """`value` as Python writes it; numbers that it does not write, in words."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _listed(choices: tuple) -> str:
    return ", ".join(str(c) for c in choices)


def flag(name: str) -> str:
    """Name of a field on the command line: `c_min` -> `--macs-c-min`."""
    return "--macs-" + name.replace("_", "-")


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected true or false")
    return text.lower() in ("true", "1")


def _parser_of(f: dataclasses.Field) -> Callable[[str], object]:
    parsers: dict[str, Callable[[str], object]] = {"bool": _parse_bool, "int": int, "int | None": int, "float": float}
    return parsers.get(_type_of(f), str)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one `--macs-*` flag per field. Their default is "not given", so that presets can fill in."""
    group = parser.add_argument_group("MACS", "modality-aware capacity scaling (sglang-macs)")
    for f in dataclasses.fields(MacsConfig):
        group.add_argument(
            flag(f.name),
            dest="macs_" + f.name,
            type=_parser_of(f),
            choices=None,  # checked by MacsConfig, whose message says the fix
            default=None,
            metavar="{" + _listed(f.metadata["choices"]).replace(", ", ",") + "}"
            if f.metadata["choices"]
            else f.name.upper(),
            help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"),
        )


def given_options(options: dict[str, object]) -> dict[str, object]:
    """The `macs_*` options that are given, among all those of a command line, a file or `sglang.Engine(...)`."""
    not_given = (None, "None")  # the latter is how SGLang hands on a null in a --config file
    return {name: v for name, v in options.items() if name.startswith("macs_") and v not in not_given}


def from_options(options: dict[str, object]) -> MacsConfig:
    """The configuration that `macs_*` options ask for; text is read as on the command line. Raises MacsError."""
    fields = {f.name: f for f in dataclasses.fields(MacsConfig)}
    given = {name.removeprefix("macs_"): value for name, value in given_options(options).items()}
    given = {k: _value(fields[k], v) if k in fields else v for k, v in given.items()}
    if given.get("profile"):
        given["profile"] = os.path.abspath(str(given["profile"]))  # workers may start elsewhere
    return MacsConfig.from_preset(str(given.pop("preset", "rank")), **given)


def _value(f: dataclasses.Field, given: object) -> object:
    text = str(given)
    if text.lower() == "false" and "off" in (f.metadata["choices"] or ()):
        return "off"  # what an unquoted off is in YAML
    try:
        return _parser_of(f)(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise MacsError(flag(f.name), repr(given), f"a value like {f.default}") from error


def flag_table() -> str:
    """The README's flag table, in Markdown."""
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for f in dataclasses.fields(MacsConfig):
        choices = f" One of {', '.join(f'`{c}`' for c in f.metadata['choices'])}." if f.metadata["choices"] else ""
        rows.append(f"| `{flag(f.name)}` | `{f.default}` | {f.metadata['help']}.{choices} |")
    return "\n".join(rows)

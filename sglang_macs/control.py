"""Options that change while a server serves: which may, what a request for it says, and what becomes of the
configuration. Nothing here imports torch.

SGLang's `POST /set_internal_state` takes numbers alone. So an option stands in the name, as on the command line, beside
any number: {"macs_gamma=1.05": 1, "macs_preset=paper": 1}; a number may stand as one, too: {"macs_gamma": 1.05}.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .choices import IMPORTANCES
from .config import OFF, PRESETS, MacsConfig, from_options
from .errors import MacsError

PREFIX = "macs_"
CHANGEABLE = ("preset", "gamma", "importance", "min_tokens", "verify", "verify_every")
SWITCHES = ("on", "trace")  # beside these: back from off; recording into the folder of --macs-trace
_OF_PRESETS = {name for options in PRESETS.values() for name in options}


def encode(options: Mapping[str, Any]) -> dict[str, float]:
    """What /set_internal_state takes under "server_args" for options by field name or switch."""
    return {f"{PREFIX}{name}={value}": 1 for name, value in options.items()}


def is_ours(name: str) -> bool:
    """Whether a name under "server_args" is one of MACS's."""
    return name.startswith(PREFIX)


def decode(server_args: Mapping[str, float]) -> dict[str, Any]:
    """Options by field name, and switches as bool. Raises MacsError for what cannot be changed or read."""
    given: dict[str, Any] = {}
    for key, number in server_args.items():
        name, says, word = key.removeprefix(PREFIX).partition("=")
        if not is_ours(key) or name not in (*CHANGEABLE, *SWITCHES):
            raise MacsError("option", key, f"one that can change at run time: {', '.join((*CHANGEABLE, *SWITCHES))}")
        given[name] = word if says else number
        if given[name] in ("", "None"):  # which the launch's reader takes for not given
            raise MacsError(name, repr(given[name]), "a value")
    switches = {name: _switch(name, given.pop(name)) for name in SWITCHES if name in given}
    if switches.get("on") is False:
        raise MacsError("on", "false", "true", "To turn MACS off: preset=off.")
    read = from_options({PREFIX + name: _plain(value) for name, value in given.items()})
    return {name: getattr(read, name) for name in given} | switches


def _plain(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _switch(name: str, value: object) -> bool:
    words = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if str(_plain(value)).lower() not in words:
        raise MacsError(name, repr(value), "on or off")
    return words[str(_plain(value)).lower()]


@dataclass(frozen=True)
class Settings:
    """The options of a server. launch: as it was started; now: in force; on: what --on brings back while MACS is off;
    traced: whether plans are recorded.
    """

    launch: MacsConfig
    now: MacsConfig
    on: MacsConfig
    traced: bool

    @classmethod
    def at_launch(cls, config: MacsConfig) -> "Settings":
        on = config if not config.is_off else of_preset(config, "rank")
        return cls(config, config, on, bool(config.trace))

    def changed(self, options: Mapping[str, Any]) -> "Settings":
        """With `options`, as `decode` gives them. Raises MacsError for what does not go together.

        A preset comes with its own options, and that of the launch with the launch's; others stay as they are.
        """
        rest = {name: value for name, value in options.items() if name not in ("preset", *SWITCHES)}
        importance = rest.get("importance", IMPORTANCES[0])
        if importance not in IMPORTANCES:
            expected = f"one of {', '.join(IMPORTANCES)}"
            raise MacsError("importance", repr(importance), expected, "A function of one's own needs a launch.")
        if options.get("trace") and not self.launch.trace:
            raise MacsError("trace", "on", "a server that was launched with --macs-trace FOLDER")
        traced = bool(options.get("trace", self.traced))
        preset = options.get("preset")
        if preset in OFF:
            if "on" in options:
                raise MacsError("on", f"it beside preset={preset}", "one of them")
            off = replace(of_preset(self.now, preset), **rest)
            return replace(self, now=off, on=replace(self.on, **_but_gamma(rest)), traced=traced)
        if preset is None and self.now.is_off and "on" not in options:
            return replace(self, now=replace(self.now, **rest), on=replace(self.on, **rest), traced=traced)
        start = self.on
        if preset is not None:
            start = self.launch if preset == self.launch.preset else of_preset(self.launch, str(preset))
        now = replace(start, **rest)
        return replace(self, now=now, on=now, traced=traced)


def _but_gamma(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "gamma"}


def of_preset(config: MacsConfig, preset: str) -> MacsConfig:
    """`config` under another preset: what presets say is the new one's or the default; gamma stays if it is finite."""
    kept = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _OF_PRESETS}
    if "gamma" not in PRESETS[preset] and not math.isinf(config.gamma):
        kept["gamma"] = config.gamma
    return MacsConfig.from_preset(preset, **{name: value for name, value in kept.items() if name != "preset"})


def difference(old: Settings, new: Settings) -> str:
    """What a change changes, in words; "nothing" where it changes nothing."""
    before, after = old.now.to_json(), new.now.to_json()
    words = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    words += [f"trace {'on' if new.traced else 'off'}"] if old.traced != new.traced else []
    return ", ".join(words) or "nothing"

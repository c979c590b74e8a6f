"""What a running server's MACS is doing, as text for a terminal: read `GET /server_info`, draw, repeat."""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from .errors import MacsError
from .stats import MODALITIES

HOME_AND_CLEAR = "\033[H\033[J"
BAR_WIDTH = 28
NOT_COUNTERS = ("version", "rank", "config")


def fetch(url: str) -> list[dict[str, Any]]:
    """The counters of every data-parallel rank of the server at `url`. Raises MacsError where there are none."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/server_info", timeout=10) as answer:
            states = json.load(answer)["internal_states"]
        found = [state["macs"] for state in states if "macs" in state]
    except (OSError, urllib.error.URLError, ValueError, KeyError, TypeError) as error:
        fix = "Is the server up, and is this its address?"
        raise MacsError("server", f"{url} ({error})", "an SGLang server's /server_info", fix) from error
    if not found:
        raise MacsError("server", f"{url} without MACS", "one launched with MACS", "Add --moe-a2a-backend macs.")
    return found


def since(now: Any, before: Any) -> Any:
    """`now - before` for every counter in two snapshots; the names in NOT_COUNTERS stay as they are now."""
    if isinstance(now, Mapping):
        before = before if isinstance(before, Mapping) else {}
        return {k: v if k in NOT_COUNTERS else since(v, before.get(k)) for k, v in now.items()}
    if isinstance(now, list):
        before = before if isinstance(before, list) else [0] * len(now)
        return [since(a, b) for a, b in zip(now, before, strict=True)]
    return now - (before or 0)


def frame(states: list[dict[str, Any]], period: str) -> str:
    """One screen of `states` (of `fetch`, or of `since`), over the time that `period` names."""
    first, config = states[0], states[0]["config"]
    head = f"MACS {config['preset']}, scope {config['scope']}, gamma {config['gamma']}"
    lines = [f"{head}, {len(first['layers'])} layers, {period}", "", *_dispatches(first), ""]
    lines += _ranks(list(first["layers"].values()))
    lines += ["", *_fates(states), "", _proof(states)]
    return "\n".join(lines)


def _dispatches(state: Mapping[str, Any]) -> list[str]:
    planned = state["planned"]
    skipped = ", ".join(f"{name} {count}" for name, count in sorted(state["skipped"].items()) if count) or "none"
    lines = [f"dispatches {state['dispatches']}   planned {planned}   left alone: {skipped}"]
    if planned:
        share, plan = state["visual_share_sum"] / planned, state["plan_seconds"] / planned * 1e3
        lines.append(f"visual share R_v {share:.2f}   plan {plan:.2f} ms of the host a dispatch")
    return lines


def _ranks(layers: list[Mapping[str, Any]]) -> list[str]:
    count = sum(layer["dispatches"] for layer in layers)
    if not count:
        return ["rows of each rank: none counted (a GPU server counts them with --macs-verify true)"]
    before, after = (
        [sum(ranks) for ranks in zip(*(layer[f"rows_{stage}"] for layer in layers if layer["dispatches"]), strict=True)]
        for stage in ("before", "after")
    )
    mean, most = max(sum(before) / len(before), 1), max(*before, *after, 1)
    lines = [f"{'rows / mean':<12} {'routed':<{BAR_WIDTH + 6}}dispatched"]
    for rank, (b, a) in enumerate(zip(before, after, strict=True)):
        bars = [f"{_bar(rows / most):<{BAR_WIDTH}} {rows / mean:4.2f} " for rows in (b, a)]
        lines.append(f"{f'rank {rank}':<12} {''.join(bars)}")
    b, a = (sum(layer[f"max_over_mean_{stage}"] for layer in layers) / count for stage in ("before", "after"))
    cut = sum(layer["cut"] for layer in layers) / count
    return [*lines, f"most loaded rank over mean, per dispatch: {b:.3f} -> {a:.3f}; a bound cut in {cut:.0%}"]


def _bar(share: float) -> str:
    eighths = round(share * BAR_WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _fates(states: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'assignments':<12}{'planned':>12}{'clipped':>20}{'re-routed':>12}{'dropped':>12}"]
    for modality in MODALITIES:
        planned, clipped, rerouted, dropped = (
            sum(state["own"][f"{fate}_{modality}"] for state in states)
            for fate in ("assignments", "clipped", "rerouted", "dropped")
        )
        share = f"({clipped / planned:.1%})" if planned else ""
        lines.append(f"{modality:<12}{planned:>12}{f'{clipped} {share}':>20}{rerouted:>12}{dropped:>12}")
    return lines


def _proof(states: list[dict[str, Any]]) -> str:
    checks, violations = (sum(sum(state[key].values()) for state in states) for key in ("checks", "violations"))
    misaligned = sum(state["misaligned"] for state in states)
    bad = " <-- must be 0" if violations or misaligned else ""
    return f"claims checked {checks}, violated {violations}; plans without a mask {misaligned}{bad}"


def watch(url: str, interval_s: float, once: bool) -> None:
    """Draws a first frame of everything since the server's start, then one of every interval, until interrupted."""
    states = fetch(url)
    print(frame(states, "since the server's start"), flush=True)
    while not once:
        time.sleep(interval_s)
        before, states = states, fetch(url)
        restarted = any(now["dispatches"] < old["dispatches"] for now, old in zip(states, before, strict=True))
        shown = states if restarted else [since(now, old) for now, old in zip(states, before, strict=True)]
        period = "since the server's start" if restarted else f"last {interval_s:g} s"
        clear = HOME_AND_CLEAR if sys.stdout.isatty() else "\n"
        print(clear + frame(shown, period), flush=True)

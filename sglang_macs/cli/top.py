"""`sglang-macs top URL`: what MACS does in a running server, as text: read `GET /server_info`, draw, repeat.

The server may be older or newer than this tool: what is missing, or not what it is taken for, is left out.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from .. import __version__
from ..choices import MODALITIES
from ..errors import printable
from ..observe.server_info import Server, State, missing_ranks, ranks
from ..observe.verdict import verdict
from .arguments import add_server, number, server_of

HELP = "a live view of what MACS does in a running server"
HOME_AND_CLEAR = "\033[H\033[J"
BAR_WIDTH = 28
MOST_RANKS = 256  # that are drawn
NOT_COUNTERS = ("version", "rank", "ranks", "config", "acting", "control", "observe")
SINCE_START = "since the server's start"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    seconds = number(float, 0.1, 86400)
    parser.add_argument("--interval", type=seconds, default=2.0, help="seconds between frames (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print everything since the server's start, and end")
    add_server(parser)


def run(args: argparse.Namespace) -> int:
    watch(server_of(args.url, args), args.interval, args.once)
    return 0


def since(now: Any, before: Any) -> Any:
    """`now - before` for every counter in two snapshots; the names in NOT_COUNTERS stay as they are now."""
    if isinstance(now, Mapping):
        before = _mapping(before)
        return {k: v if k in NOT_COUNTERS else since(v, before.get(k)) for k, v in now.items()}
    if isinstance(now, list):
        before = before if isinstance(before, list) else []
        return [since(a, b) for a, b in zip(now, before + [0] * len(now), strict=False)]
    return _number(now) - _number(before)


def frame(states: Sequence[State], period: str) -> str:
    """One screen of `states` (of `Server.states`, or of `since`), over the time that `period` names."""
    layers = _sum([_mapping(layer) for state in states for layer in _mapping(state.get("layers")).values()])
    count = len({layer for state in states for layer in _mapping(state.get("layers"))})
    config = _mapping(states[0].get("config"))
    preset, scope, gamma = (printable(config.get(name, "?"), 16) for name in ("preset", "scope", "gamma"))
    head = f"MACS {preset}, scope {scope}, gamma {gamma}"
    observed = [verdict(states)] if preset == "observe" else []
    sections = (_notes(states), observed, _dispatches(states), _ranks(layers), _outcomes(states), _proof(states))
    shown = ["\n".join(section) for section in sections if section]
    return "\n\n".join([f"{head}, {f'{count} layers, ' if count else ''}{period}", *shown])


def _notes(states: Sequence[State]) -> list[str]:
    """What a reader must know about the figures: another version, counters that are not there."""
    versions = sorted({printable(state.get("version", "unknown"), 64) for state in states})
    notes = []
    if versions != [__version__]:
        notes.append(f"the server has sglang-macs {', '.join(versions[:4])}, this is {__version__}")
    if missing := missing_ranks(states):
        notes.append(f"{missing}: the others do not answer /server_info")
    return notes


def _dispatches(states: Sequence[State]) -> list[str]:
    total = _sum([{k: v for k, v in state.items() if k not in NOT_COUNTERS} for state in states])
    if "dispatches" not in total:
        return []
    planned, skipped = _number(total.get("planned")), _mapping(total.get("skipped"))
    reasons = [f"{printable(name, 24)} {count:.0f}" for name, count in sorted(skipped.items())[:12] if _number(count)]
    dispatches, of = _number(total["dispatches"]), max(len(ranks(states)[0]), 1)
    lines = [
        f"dispatches {dispatches:.0f} of {of} rank{'s' * (of > 1)}   planned {planned:.0f}   "
        f"left alone: {', '.join(reasons) or 'none'}"
    ]
    if planned:
        share, plan = (_number(total.get(name)) / planned for name in ("visual_share_sum", "plan_seconds"))
        lines.append(f"visual share R_v {share:.2f}   plan {plan * 1e3:.2f} ms of the host a dispatch")
    return lines + _gain(states, planned, _number(skipped.get("no_gain")))


def _gain(states: Sequence[State], planned: float, left_alone: float) -> list[str]:
    """Rows off the most loaded rank, where layers are planned that gain enough."""
    pays = _number(_mapping(states[0].get("acting")).get("rows_that_pay"))
    if not pays:
        return []
    expected = _sum([_mapping(state.get("expected_gain")) for state in states])
    per_plan, per_other = (
        _number(expected.get(name)) / max(count, 1) for name, count in (("planned", planned), ("no_gain", left_alone))
    )
    shown = f"expected gain, rows off the most loaded rank: {per_plan:.0f} a plan, {per_other:.0f} where left alone"
    return [f"{shown}; a plan pays from {pays:.0f} on"]


def _ranks(layers: Mapping[str, Any]) -> list[str]:
    """Of the counters of all layers together, which every rank has for the whole group."""
    count = _number(layers.get("dispatches"))
    before, after = ([_number(n) for n in _list(layers.get(f"rows_{stage}"))] for stage in ("before", "after"))
    if not count or not before or len(before) != len(after):
        return ["rows of each rank: none counted yet"]
    mean, most = max(sum(before) / len(before), 1), max(*before, *after, 1)
    lines = [f"{'rows / mean':<12} {'routed':<{BAR_WIDTH + 6}}dispatched"]
    for rank, (b, a) in enumerate(zip(before[:MOST_RANKS], after[:MOST_RANKS], strict=True)):
        bars = [f"{_bar(rows / most):<{BAR_WIDTH}} {rows / mean:4.2f} " for rows in (b, a)]
        lines.append(f"{f'rank {rank}':<12} {''.join(bars)}")
    if len(before) > MOST_RANKS:
        lines.append(f"and {len(before) - MOST_RANKS} more")
    names = ("max_over_mean_before", "max_over_mean_after", "cut")
    b, a, cut = (_number(layers.get(name)) / count for name in names)
    return [*lines, f"most loaded rank over mean, per dispatch: {b:.3f} -> {a:.3f}; a bound cut in {cut:.0%}"]


def _bar(share: float) -> str:
    eighths = max(round(share * BAR_WIDTH * 8), 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _outcomes(states: Sequence[State]) -> list[str]:
    own = _sum([_mapping(state.get("own")) for state in states])
    if not own:
        return []
    moved = {m: int(_number(own.get(f"moved_{m}"))) for m in MODALITIES}
    replicas = any(moved.values())
    head = f"{'assignments':<12}{'planned':>12}" + f"{'moved':>12}" * replicas
    lines = [head + f"{'clipped':>20}{'re-routed':>12}{'dropped':>12}"]
    for modality in MODALITIES:
        planned, clipped, rerouted, dropped = (
            int(_number(own.get(f"{name}_{modality}"))) for name in ("assignments", "clipped", "rerouted", "dropped")
        )
        share = f"({clipped / planned:.1%})" if planned else ""
        head = f"{modality:<12}{planned:>12}" + f"{moved[modality]:>12}" * replicas
        lines.append(head + f"{f'{clipped} {share}':>20}{rerouted:>12}{dropped:>12}")
    return lines


def _proof(states: Sequence[State]) -> list[str]:
    if not any({"checks", "violations", "misaligned"} & state.keys() for state in states):
        return []
    checks, violations = (
        sum(int(_number(n)) for state in states for n in _mapping(state.get(key)).values())
        for key in ("checks", "violations")
    )
    misaligned = sum(int(_number(state.get("misaligned"))) for state in states)
    bad = " <-- must be 0" if violations or misaligned else ""
    return [f"claims checked {checks}, violated {violations}; plans without a mask {misaligned}{bad}"]


# ---- Counters of any shape -----------------------------------------------------------------------------------------


def _sum(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of counters, lists of them, and tables of them, by name."""
    by_name: dict[str, list[Any]] = {}
    for table in tables:
        for name, value in table.items():
            by_name.setdefault(name, []).append(value)
    return {name: _added(values) for name, values in by_name.items()}


def _added(values: list[Any]) -> Any:
    if any(isinstance(value, Mapping) for value in values):
        return _sum([_mapping(value) for value in values])
    if any(isinstance(value, list) for value in values):
        return [_added(list(together)) for together in zip_longest(*map(_list, values), fillvalue=0)]
    return sum(map(_number, values))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float:
    """A counter, 0 for whatever is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 2**63 else 0  # NaN is not below it


# ---- Frame after frame ---------------------------------------------------------------------------------------------


def watch(server: Server, interval_s: float, once: bool) -> None:
    """Draws a first frame of everything since the server's start, then one of every interval, until interrupted."""
    states = server.states()
    print(frame(states, SINCE_START), flush=True)
    while not once:
        time.sleep(interval_s)
        before, states = states, server.states()
        clear = HOME_AND_CLEAR if sys.stdout.isatty() else "\n"
        print(clear + next_frame(states, before, interval_s), flush=True)


def next_frame(states: Sequence[State], before: Sequence[State], interval_s: float) -> str:
    """What came since the look before; everything where that cannot be said: ranks came, went or started again."""
    old, new = _by_rank(before), _by_rank(states)
    if old.keys() != new.keys() or any(_dispatched(new[key]) < _dispatched(old[key]) for key in new):
        return frame(states, SINCE_START)
    return frame([since(new[key], old[key]) for key in new], f"last {interval_s:g} s")


def _dispatched(state: State) -> float:
    return _number(state.get("dispatches"))


def _by_rank(states: Sequence[State]) -> dict[tuple[str, int], State]:
    """By expert-parallel rank, and which one of that rank: every pipeline stage has its own."""
    seen: Counter[str] = Counter()
    found = {}
    for state in states:
        rank = repr(state.get("rank"))
        found[rank, seen[rank]] = state
        seen[rank] += 1
    return found

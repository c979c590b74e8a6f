"""The counters of ranks that SGLang does not ask: `GET /server_info` reaches attention-TP rank 0 of the first pipeline
stage alone. The others leave their counters in the process group's key-value store, and that one adds them up.

A store needs no collective: nobody waits for a rank that is gone.
"""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

SUMMED = (
    "dispatches",
    "planned",
    "bounded",
    "graphs",
    "fused",
    "skipped",
    "expected_gain",
    "misaligned",
    "received_rows",
    "remote_rows",
    "runner_calls",
    "plan_seconds",
    "visual_share_sum",
    "checks",
    "violations",
    "own",
    "expert_rows",
)
TIMEOUT_SECONDS = 1.0
IDLE_SECONDS = 1.0
_PREFIX = "sglang-macs/state/"

Key = tuple[int, int]  # pipeline stage, tensor-parallel rank


class SharedState:
    """One rank's access to the store.

    Args:
        store: of the process group that all ranks of the server are in.
        key: of this rank.
        asked_with: ranks that get the same request at the same time, and so publish at once; waited for, but not long.
        asked_later: ranks of later stages; their last publication is taken.
    """

    def __init__(self, store: dist.Store, key: Key, asked_with: Iterable[Key] = (), asked_later: Iterable[Key] = ()):
        self._store, self._key = store, key
        self._asked_with, self._asked_later = tuple(asked_with), tuple(asked_later)
        self._serial = 0
        self._published, self._last = 0, float("-inf")

    def is_due(self, dispatches: int) -> bool:
        """Whether an idle rank of a later stage should publish: something new was counted, and not just now."""
        asked = self._key[0] == 0
        return not asked and dispatches != self._published and time.monotonic() - self._last > IDLE_SECONDS

    def publish(self, state: Mapping[str, Any]) -> None:
        """Leaves this rank's state for the one that answers."""
        self._published, self._last = state["dispatches"], time.monotonic()
        self._store.set(_name(self._key), json.dumps([self._serial, state]))

    def answer(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Of the rank that is asked or, as its own, of any other: the state of all ranks that it speaks for."""
        self._serial += 1
        state = json.loads(json.dumps(state))  # keys as they are in what others published: strings
        if not (self._asked_with or self._asked_later):
            self.publish(state)
            return merged([state])
        deadline = time.monotonic() + TIMEOUT_SECONDS
        found = [self._read(key, self._serial, deadline) for key in self._asked_with]
        found += [self._read(key, 0, 0.0) for key in self._asked_later]
        return merged([state, *(one for one in found if one is not None)])

    def _read(self, key: Key, serial: int, deadline: float) -> dict[str, Any] | None:
        """What `key` published last, from its answer number `serial` on if that comes before the deadline."""
        while True:
            known = self._store.check([_name(key)])
            published, state = json.loads(self._store.get(_name(key))) if known else (-1, None)
            if published >= serial or time.monotonic() > deadline:
                return state
            time.sleep(0.01)


def _name(key: Key) -> str:
    return f"{_PREFIX}{key[0]}/{key[1]}"


def merged(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of several ranks: counts added up, facts of the group (`layers`) from whichever rank has them. `ranks`
    says which expert-parallel ranks are in it.
    """
    first = states[0]
    result = dict(first)
    for name in SUMMED:
        result[name] = _sum([state[name] for state in states])
    if "trace" in first:  # of the rank that answers, and the first reason why any rank of them stopped
        stopped = next(filter(None, (state["trace"]["stopped"] for state in states)), "")
        result["trace"] = first["trace"] | {"stopped": stopped}
    result["layers"] = {layer: facts for state in reversed(states) for layer, facts in state["layers"].items()}
    result["ranks"] = {"ep_size": result.pop("ep_size"), "answering": sorted({state["rank"] for state in states})}
    return result


def _sum(values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        names = {name: None for value in values for name in value}  # in order
        return {name: _sum([value[name] for value in values if name in value]) for name in names}
    if isinstance(values[0], list):
        return [_sum(list(items)) for items in zip(*values, strict=True)]
    return sum(values)

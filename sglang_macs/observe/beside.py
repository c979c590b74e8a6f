"""What is seen of a pass in which nothing is planned (`--macs-preset observe`), beside the pass: the rows of its layers
are exchanged in one all-reduce behind the last of them, which nobody waits for, and counted when it is done.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import MacsConfig
from ..plan.batch import TEXT
from .stats import Recount, Stats

VISUAL_WEIGHT = 0.5  # of a visual token, on average; nothing is scored


class _Dispatch(NamedTuple):
    """rows [E] i64, of this rank's assignments by expert."""

    layer_id: int
    num_ranks: int
    rows: Tensor


class _UnderWay(NamedTuple):
    """numbers: visual and text tokens, then the rows of every dispatch; seconds: of the pass, or its two events."""

    numbers: Tensor
    work: dist.Work | None
    dispatches: list[_Dispatch]
    config: MacsConfig
    seconds: float | tuple[torch.cuda.Event, torch.cuda.Event]


class Observed:
    """Of one process. Every rank observes the same passes, and in each of them the same layers."""

    def __init__(self, counters: Stats) -> None:
        self._counters = counters
        self._tokens: Tensor | None = None  # [2] of the pass that is running
        self._group: dist.ProcessGroup | None = None
        self._config: MacsConfig | None = None
        self._dispatches: list[_Dispatch] = []
        self._began: float | torch.cuda.Event | None = None
        self._under_way: deque[_UnderWay] = deque()

    def begin_pass(self) -> None:
        """Before a pass that is measured."""
        self._tokens, self._dispatches, self._began = None, [], _now()

    def add_tokens(self, group: dist.ProcessGroup | None, config: MacsConfig, ids: Tensor, segment: Tensor) -> None:
        """Once a pass: which rows that go anywhere, ids [T, K], are visual, segment [T]. group: of the EP ranks."""
        if self._began is not None and self._tokens is None:
            routed = (ids >= 0).any(dim=1)
            self._tokens = torch.stack([(routed & (segment >= 0)).sum(), (routed & (segment == TEXT)).sum()])
            self._group, self._config = group, config

    def add(self, layer_id: int, num_ranks: int, rows: Tensor) -> None:
        """One dispatch: this rank's assignments by expert, [E] i64."""
        if self._began is not None:
            self._dispatches.append(_Dispatch(layer_id, num_ranks, rows))

    def end_pass(self) -> None:
        """Behind each pass. Collective behind one that is measured."""
        began, self._began = self._began, None
        if began is not None and self._tokens is not None and self._config is not None:
            with torch.inference_mode():
                numbers = torch.cat([self._tokens, *(one.rows for one in self._dispatches)])
                work = dist.all_reduce(numbers, group=self._group, async_op=True) if self._group else None
            ended = _now()
            seconds = ended - began if isinstance(ended, float) and isinstance(began, float) else (began, ended)
            self._under_way.append(_UnderWay(numbers, work, self._dispatches, self._config, seconds))
        self._tokens, self._dispatches = None, []
        self.collect()

    def collect(self) -> None:
        """Counts what has arrived; waits for nothing."""
        while self._under_way and _is_done(self._under_way[0]):
            self._count(self._under_way.popleft())

    def _count(self, arrived: _UnderWay) -> None:
        if arrived.work is not None:
            arrived.work.wait()  # of the stream, on a GPU
        with torch.inference_mode():
            tokens, *rows = arrived.numbers.split([2, *(one.rows.numel() for one in arrived.dispatches)])
            visual, text = tokens.double().unbind()
            weight = VISUAL_WEIGHT * visual
            self._counters.observed_share += torch.where(weight + text > 0, weight / (weight + text), 0.5)
            for one, group in zip(arrived.dispatches, rows, strict=True):
                both = group.expand(2, -1)  # before and after
                self._counters.add_recount(Recount(arrived.config, one.layer_id, one.num_ranks, both, both, None))
        seconds = arrived.seconds
        if isinstance(seconds, tuple):
            seconds = seconds[0].elapsed_time(seconds[1]) / 1e3
        self._counters.observed_passes += 1
        self._counters.observed_seconds += seconds


def _now() -> float | torch.cuda.Event:
    """A time of the host or, where there is a GPU, of the current stream."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _is_done(one: _UnderWay) -> bool:
    timed = not isinstance(one.seconds, tuple) or one.seconds[1].query()
    return timed and (one.work is None or one.work.is_completed())

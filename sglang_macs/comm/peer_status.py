"""What kernels that wait for peers have recorded in a rank's region: a wait that gave up, or a peer that was wrong."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_STATUS = struct.Struct("=iiiiIIqq")  # FusedStatus of csrc/include/macs/fused.h
SIZE = _STATUS.size
MOST_ON_THEIR_WAY = 8  # copies: passes that a host is ahead of its device, and more

# By Fault of that file: what the rank in question did or did not do.
FAULTS = (
    "nothing",
    "never scored its tokens",
    "never sent its assignments",
    "never sent its cuts",
    "never proposed where its clipped assignments go",
    "never sent its rows per expert",
    "never finished sending its rows",
    "never offered its experts' outputs",
    "claims more tokens than there may be",
    "names an expert that does not exist",
    "claims more rows for an expert than it has tokens",
    "would get more rows than its buffer holds",
    "never sent its part of a sum",
)


class Record(NamedTuple):
    """The first fault of a rank; peer and block -1: not known which; layer -1: of none."""

    fault: int
    peer: int
    block: int
    layer: int
    epoch: int
    limit_ms: int
    seen: int
    expected: int

    @property
    def words(self) -> str:
        """Who did not do what."""
        who = f"rank {self.peer}" if self.peer >= 0 else "a rank"
        who += f" (block {self.block})" if self.block >= 0 else ""
        return f"{who} {FAULTS[self.fault] if 0 < self.fault < len(FAULTS) else f'fault {self.fault}'}"


def read(status: Tensor) -> Record | None:
    """Of [SIZE] u8 on the host; None: nothing is wrong."""
    record = Record(*_STATUS.unpack(status.numpy().tobytes()))
    return record if record.fault else None


class Watch:
    """Looks at what kernels have recorded without making the host wait.

    read: what it says, from a copy on the host; None: nothing is wrong.
    """

    def __init__(self, read: Callable[[Tensor], Any] = read) -> None:
        self._read = read
        self._on_their_way: deque[tuple[Tensor, torch.cuda.Event]] = (
            deque()
        )  # copies to the host, in the stream's order

    def look(self, status: Tensor) -> Any:
        """The record as it was at an earlier call; sends for the next. status: what `read` takes, here [SIZE] u8."""
        found = self.arrived()
        if len(self._on_their_way) < MOST_ON_THEIR_WAY:
            copy = torch.empty(status.shape, dtype=status.dtype, pin_memory=True)
            copy.copy_(status, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._on_their_way.append((copy, event))
        return found

    def arrived(self) -> Any:
        """The first record of those that were sent for and are here."""
        found = None
        while self._on_their_way and self._on_their_way[0][1].query():
            said = self._read(self._on_their_way.popleft()[0])
            found = said if found is None else found
        return found

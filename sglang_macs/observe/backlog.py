"""Counting late: what is counted of a dispatch is kept as it is and added up for many dispatches at once, since a
launch costs a GPU's host as much as a good part of a plan does, and torch's own call a CPU's.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOST = 64  # dispatches that wait


class Backlog:
    """Dispatches that are still to be counted, at most `MOST`.

    Why the tensors of an item may be kept: nobody writes to them again (every operator returns new memory), and here
    they are read on the stream they were made on, behind what made them, and let go there, where torch's allocator
    reuses memory in the order of that stream. A reader on another stream waits for it on the device, not on the host,
    and it for the reader (`settled`). If the dispatches move to another stream, what is left is counted on the old one,
    and the new one waits for it.

    Args:
        count: adds items, all alike, to sums; in place where there are sums already, so that none is freed on a
            stream other than its own.
    """

    def __init__(self, count: Callable[[Sequence[Any]], None]) -> None:
        self._count = count
        self._items: list[Any] = []
        self._alike: Hashable = None
        self._stream: torch.cuda.Stream | None = None  # of the items and the sums; None on a CPU

    def add(self, item: Any, on: torch.device, alike: Hashable) -> None:
        """alike: what items that are counted together have in common, such as their shapes."""
        stream = torch.cuda.current_stream(on) if on.type == "cuda" else None
        if alike != self._alike or stream != self._stream:
            self.count()
            if stream is not None and self._stream is not None:
                stream.wait_stream(self._stream)
            self._alike, self._stream = alike, stream
        self._items.append(item)
        if len(self._items) == MOST:
            self.count()

    def count(self) -> None:
        """Counts what waits."""
        if not self._items:
            return
        items, self._items = self._items, []
        with torch.inference_mode(), torch.cuda.stream(self._stream):  # passes run in it; no gradients
            self._count(items)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Everything is counted for the current stream, and what comes later waits until it has read."""
        self.count()
        if self._stream is None:
            yield
            return
        reader = torch.cuda.current_stream(self._stream.device)
        reader.wait_stream(self._stream)
        yield
        self._stream.wait_stream(reader)


class SumsByLayer:
    """A sum of tensors of one shape for every layer, in one tensor: one addition for the dispatches of many layers."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}  # of each layer in `sums`
        self._index: dict[tuple[int, ...], Tensor] = {}  # by what it holds: passes count the same layers again
        self.sums: Tensor | None = None  # [layers, ...]

    def add(self, layer_ids: Sequence[int], values: Tensor) -> None:
        """values [N, ...] of N dispatches; a layer may be there several times."""
        at = tuple(self.places.setdefault(layer_id, len(self.places)) for layer_id in layer_ids)
        self._grow(values)
        index = self._index.get(at)
        if index is None:
            # From pinned memory, since the host would wait for a copy from elsewhere.
            index = torch.tensor(at, pin_memory=values.is_cuda).to(values.device, non_blocking=True)
            if len(self._index) < MOST:  # as many as 64 dispatches of 61 layers, say, begin with
                self._index[at] = index
        self.sums.index_add_(0, index, values)

    def _grow(self, values: Tensor) -> None:
        """Room for every layer, in the first passes."""
        before, self.sums = self.sums, self.sums if self.sums is not None else values.new_empty(0, *values.shape[1:])
        missing = len(self.places) - self.sums.shape[0]
        if missing:
            self.sums = torch.cat([self.sums, values.new_zeros(missing, *values.shape[1:])])
            if before is not None and before.is_cuda:
                before.record_stream(torch.cuda.current_stream(before.device))

    def to_host(self) -> "SumsByLayer":
        """A copy, on its way."""
        copy = SumsByLayer()
        copy.places = dict(self.places)
        copy.sums = None if self.sums is None else to_host(self.sums)
        return copy

    def by_layer(self) -> dict[int, Any]:
        """{layer id: numbers, nested as the shape is}."""
        sums = [] if self.sums is None else self.sums.tolist()
        return {layer_id: sums[place] for layer_id, place in self.places.items()}


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; from a GPU it is there when the current stream is (torch puts it into pinned memory)."""
    return tensor.to("cpu", non_blocking=True, copy=True)

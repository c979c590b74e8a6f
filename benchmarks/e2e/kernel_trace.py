"""How long kernels run, from the traces of SGLang's profiler (Chrome's format, gzipped, one a rank)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
WAITING = ("notify_dispatch",)  # kernels that only wait for peers and the host


def union(intervals: list[tuple[float, float]]) -> float:
    """Length of what the intervals (start, end) cover together."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def busy(events: list[dict]) -> dict[str, float] | None:
    """Shares of the time from the first kernel's start to the last one's end; None if no kernel ran.

    busy: a kernel runs. working: one runs that is not in WAITING.
    """
    ran = [e for e in events if e.get("cat") in DEVICE and "dur" in e]
    if not ran:
        return None
    intervals = [(e["ts"], e["ts"] + e["dur"]) for e in ran]
    working = [i for i, e in zip(intervals, ran, strict=True) if not any(name in e["name"] for name in WAITING)]
    window = max(end for _, end in intervals) - min(start for start, _ in intervals)
    return {"busy": union(intervals) / window, "working": union(working) / window} if window else None


def read(file: Path) -> list[dict]:
    """The events of one trace."""
    with gzip.open(file) as trace:
        return json.load(trace)["traceEvents"]


def of_ranks(files: list[Path]) -> dict | None:
    """{"busy", "working": mean over ranks, "busy_of_ranks": [...]}; None without kernels."""
    found = [shares for file in sorted(files) if (shares := busy(read(file)))]
    if not found:
        return None
    means = {name: sum(rank[name] for rank in found) / len(found) for name in found[0]}
    return {**means, "busy_of_ranks": [rank["busy"] for rank in found]}

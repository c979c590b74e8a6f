"""A plugin of SGLang for benchmarks/check_cost.py alone: switches MACS's plans on and off, and times both sides.

In the folder MACS_PROBE, the file `switch` says by being there that batches are planned; without it they are left
alone, as with preset off. Each scheduler process writes `spent-PID.json` there after every forward pass: seconds of
CPU time in passes and in the layers' decisions, and the wall time of each decision in ms, as [left alone, planned].
"""

import json
import multiprocessing
import os
import time
from pathlib import Path

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_macs.dispatch import planner
from sglang_macs.plan import batch

FOLDER = Path(os.environ["MACS_PROBE"])
FORWARD = "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation"  # around what MACS hooks
decide, plan = batch.skip_reason, planner.LayerPlanner.__call__
spent = {"cpu_seconds": [0.0, 0.0], "layer_cpu_seconds": [0.0, 0.0], "layer_ms": [[], []]}


def side() -> int:
    """0: left alone, 1: planned. Changed only between requests, so all ranks see the same."""
    return int((FOLDER / "switch").is_file())


def skip_reason(config, **known) -> str:
    """In the place of `batch.skip_reason`."""
    return decide(config, **known) or ("" if side() else "off")


def timed_layer(self, hidden_states, *args):
    """In the place of `LayerPlanner.__call__`."""
    now, start, cpu = side(), time.perf_counter(), time.process_time()
    planned = plan(self, hidden_states, *args)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    spent["layer_cpu_seconds"][now] += cpu
    if hidden_states.shape[0] and batch.current().skip in ("", "off"):  # a rank without tokens waits for the other
        spent["layer_ms"][now].append(1e3 * seconds)
    return planned


def timed_forward(original, *args, **kwargs):
    """AROUND a forward pass."""
    now, start = side(), time.process_time()
    result = original(*args, **kwargs)
    spent["cpu_seconds"][now] += time.process_time() - start
    partial = FOLDER / f"partial-{os.getpid()}"
    partial.write_text(json.dumps(spent))
    partial.rename(FOLDER / f"spent-{os.getpid()}.json")  # the reader sees all of it or none
    return result


def register() -> None:
    """Entry point; the launcher must not import the model stack, which applying the hook would do."""
    if multiprocessing.parent_process() is not None:
        batch.skip_reason, planner.LayerPlanner.__call__ = skip_reason, timed_layer
        HookRegistry.register(FORWARD, timed_forward, HookType.AROUND)

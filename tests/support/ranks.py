"""Runs a function on several gloo ranks, each a process of its own, and collects what they return.

They are forks of a process that has imported torch, the package and what tests import, and has done nothing else: each
import would take a process longer than most of these tests.
"""

import io
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ("torch.distributed", "hypothesis", "pytest", "sglang_macs.dispatch.planner", "tests.support.ranks")


def _entry(
    rank: int, world: int, store: str, environment: dict[str, str], function: Callable[..., Any], args: tuple, results
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the process that was forked has that of its start
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        # As bytes: a tensor on the queue would live in a file descriptor of this process, which ends.
        buffer = io.BytesIO()
        torch.save(function(rank, world, *args), buffer)
        results.put((rank, buffer.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """`[function(rank, world, *args) for rank in range(world)]`, collectively. Fails with the first rank's
    traceback.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [
            context.Process(target=_entry, args=(rank, world, store, dict(os.environ), function, args, results))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            got = [results.get(timeout=timeout_s) for _ in range(world)]
        finally:
            for process in processes:
                process.join(timeout=10)
                process.kill()
    errors = [f"rank {rank}:\n{error}" for rank, _, error in got if error]
    assert not errors, "\n".join(errors)
    return [torch.load(io.BytesIO(value), weights_only=False) for _, value, _ in sorted(got, key=lambda item: item[0])]

"""Where the ranks of a server stand that no longer answers: Python's stacks, and the kernels that their GPUs run.

The stacks are dumped into the server's log by a signal that routing_site has registered: no interpreter has to run for
it, so that a rank that waits for its GPU with the interpreter's lock in hand tells, too. Kernels are cuda-gdb's answer.
"""

from __future__ import annotations

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from benchmarks.serving import Server

CUDA_GDB = Path("/usr/local/cuda/bin/cuda-gdb")
QUESTIONS = ("info cuda kernels", "info cuda devices", "info cuda blocks", "thread apply 1 bt 12")
DUMP_SECONDS = 2.0  # until the stacks are written
DEBUGGER_SECONDS = 75.0
MOST_CHARACTERS = 6000  # of one rank's kernels


def look(server: Server) -> str:
    """The stacks of all its ranks, then each rank's kernels; "" for a server that has ended."""
    if server.process is None or server.process.poll() is not None:
        return ""
    ranks, before = schedulers(server.process.pid), server.log.stat().st_size
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    time.sleep(DUMP_SECONDS)
    with server.log.open(errors="replace") as log:
        log.seek(before)
        found = [log.read()]
    if CUDA_GDB.exists():
        with ThreadPoolExecutor(max(1, len(ranks))) as pool:
            found += pool.map(kernels, (rank.pid for rank in ranks))
    return "\n".join(found)


def schedulers(launcher: int) -> list[psutil.Process]:
    """Of the server that this process has started, by pid."""
    found = psutil.Process(launcher).children(recursive=True)
    return sorted((p for p in found if any("scheduler" in word for word in p.cmdline())), key=lambda p: p.pid)


def kernels(pid: int) -> str:
    """What the process's GPU runs. Symbols of its libraries, gigabytes of them, are not loaded for it."""
    asked = ("set pagination off", "set auto-solib-add off", f"attach {pid}", *QUESTIONS)
    command = [str(CUDA_GDB), "-nx", "-batch", *(word for line in asked for word in ("-ex", line))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEBUGGER_SECONDS, check=False)
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = f"cuda-gdb took more than {DEBUGGER_SECONDS:g} s\n" + (error.stdout or b"").decode(errors="replace")
    told = [line for line in said.splitlines() if not line.startswith(("warning", "[New", "[Thread"))]
    return f"process {pid}:\n" + "\n".join(told)[:MOST_CHARACTERS]

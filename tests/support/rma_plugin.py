"""tools/rma_tcp through ctypes, as NCCL calls it, in one process a rank. No GPU, no NCCL, no torch."""

import ctypes
import multiprocessing
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parents[2] / "tools" / "rma_tcp"
HOST, CUDA = 1, 2  # NCCL_PTR_*
INC, ADD = 1, 2  # NCCL_NET_SIGNAL_OP_*
REMOTE_ERROR = 6  # ncclRemoteError
# NCCL's order (ncclRma_v14_t); a pointer to the name stands before them.
FUNCTIONS = [
    *(
        "init",
        "devices",
        "properties",
        "listen",
        "connect",
        "create_context",
        "register",
        "register_dmabuf",
        "deregister",
    ),
    *("destroy_context", "close_group", "close_listener", "put", "put_signal", "get", "flush", "test", "progress"),
    *("query_last_error", "finalize"),
]
LOGGER = ctypes.CFUNCTYPE(
    None, ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p
)
u32, u64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p


def build(folder: Path) -> Path:
    """The plugin, compiled as tools/rma_tcp/build.sh does."""
    library = folder / "librma_tcp.so"
    subprocess.run(["bash", str(SOURCES / "build.sh"), str(library)], check=True)
    return library


class PluginError(Exception):
    """A function of the table did not return ncclSuccess; `status` is what it did, the text what was logged."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Plugin:
    """The table `ncclRmaPlugin_v14`; each function raises PluginError where it returns an error."""

    def __init__(self, library: str) -> None:
        self.lines: list[str] = []
        self._library = ctypes.CDLL(library)
        table = (ctypes.c_void_p * (1 + len(FUNCTIONS))).in_dll(self._library, "ncclRmaPlugin_v14")
        self._table = {name: ctypes.CFUNCTYPE(ctypes.c_int)(table[1 + i]) for i, name in enumerate(FUNCTIONS)}
        self._logger = LOGGER(lambda *args: self.lines.append(args[-1].decode()))
        self.call("init", ctypes.byref(pointer()), u64(7), self._logger)

    def call(self, name: str, *args: Any) -> None:
        if status := self._table[name](*args):
            raise PluginError(status, self.lines[-1] if self.lines else "")

    def fault(self, text: str) -> None:
        if status := self._library.rma_tcp_fault(text.encode()):
            raise PluginError(status, self.lines[-1])


class Memory:
    """`size` bytes of this rank, zeroed, registered as `kind`."""

    def __init__(self, peer: "Peer", size: int, kind: int = HOST) -> None:
        self.bytes = ctypes.create_string_buffer(size)
        self.region = pointer()
        address = ctypes.addressof(self.bytes) ^ (1 << 62 if kind == CUDA else 0)  # which the host cannot read
        where = (pointer(address), ctypes.c_size_t(size))
        peer.plugin.call("register", peer.group, *where, kind, u64(0), ctypes.byref(self.region))

    def word(self, offset: int) -> int:
        return u64.from_buffer(self.bytes, offset).value

    def __getitem__(self, part: slice) -> bytes:
        return bytes(memoryview(self.bytes).cast("B")[part])

    def __setitem__(self, part: slice, value: bytes) -> None:
        memoryview(self.bytes).cast("B")[part] = value


class Peer:
    """One rank of a group. contexts: how many it creates; stride: of the ranks that they connect."""

    def __init__(self, library: str, rank: int, ranks: int, exchange: Callable[[bytes], list[bytes]], barrier) -> None:
        self.rank, self.ranks, self.barrier = rank, ranks, barrier
        self.plugin = Plugin(library)
        handle, listener, self.group, self.context = ctypes.create_string_buffer(128), pointer(), pointer(), pointer()
        self.plugin.call("listen", None, 0, handle, ctypes.byref(listener))
        handles = [ctypes.create_string_buffer(other, 128) for other in exchange(handle.raw)]
        array = (pointer * ranks)(*(ctypes.addressof(h) for h in handles))
        self.plugin.call("connect", None, array, ranks, rank, listener, ctypes.byref(self.group))
        self.plugin.call("close_listener", listener)

    def create_context(self, contexts: int = 4, stride: int = 1) -> None:
        config = (ctypes.c_int * 3)(contexts, -1, stride)
        self.context = pointer()  # another object: a thread may be at work with the one before
        self.plugin.call("create_context", self.group, config, ctypes.byref(self.context))

    def close(self) -> None:
        self.plugin.call("destroy_context", self.context)
        self.plugin.call("close_group", self.group)

    def put(self, to: int, memory: Memory, source: int, size: int, target: int, context: int = 0) -> pointer:
        request = pointer()
        where = (u64(source), memory.region, ctypes.c_size_t(size), u64(target), memory.region, u32(to))
        self.plugin.call("put", self.context, context, *where, ctypes.byref(request))
        return request

    def signal(
        self, to: int, at: tuple[Memory, int], value: int = 1, operation: int = ADD, context: int = 0, put: tuple = ()
    ) -> pointer:
        """put: memory, source, size and target of what goes before the signal."""
        memory, source, size, target = put or (None, 0, 0, 0)
        region, request = memory.region if memory else None, pointer()
        where = (u64(source), region, ctypes.c_size_t(size), u64(target), region, u32(to))
        how = (u64(at[1]), at[0].region, u64(value), u32(operation), ctypes.c_bool(True))
        self.plugin.call("put_signal", self.context, context, *where, *how, ctypes.byref(request))
        return request

    def get(self, of: int, memory: Memory, source: int, size: int, target: int, context: int = 0) -> pointer:
        request = pointer()
        where = (u64(source), memory.region, ctypes.c_size_t(size), u64(target), memory.region, u32(of))
        self.plugin.call("get", self.context, context, *where, ctypes.byref(request))
        return request

    def done(self, request: pointer) -> bool:
        done = ctypes.c_int()
        self.plugin.call("test", self.group, request, ctypes.byref(done))
        return bool(done.value)

    def wait(self, *requests: pointer) -> None:
        """Tests and makes progress in turn, as NCCL's thread does."""
        for request in requests:
            self.until(lambda one=request: self.done(one))

    def progress(self) -> None:
        """What NCCL's progress thread does all the time."""
        self.plugin.call("progress", self.context)

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.progress()
            time.sleep(0)

    def meet(self) -> None:
        """A barrier of the test that keeps making progress, as NCCL's thread would."""
        arrived = self.barrier
        with arrived.get_lock():
            arrived.value += 1
            goal = -(-arrived.value // self.ranks) * self.ranks
        self.until(lambda: arrived.value >= goal)

    def refused(self, action: Callable[[], Any]) -> PluginError:
        """What the action raises. What it ends in otherwise is a failure of the test."""
        try:
            value = action()
        except PluginError as error:
            return error
        raise AssertionError(f"got {value}, expected an error of the plugin")

    def failed(self) -> bool:
        flag = ctypes.c_bool()
        self.plugin.call("query_last_error", self.context, ctypes.byref(flag))
        return flag.value


def _entry(pipe, library: str, rank: int, ranks: int, barrier, environment, function, args) -> None:
    os.environ.update(environment)

    def exchange(mine: bytes) -> list[bytes]:
        pipe.send(("exchange", mine))
        return pipe.recv()

    try:
        pipe.send(("value", function(Peer(library, rank, ranks, exchange, barrier), *args)))
        pipe.recv()  # all have ended
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    os._exit(0)  # the group may have failed, on purpose: nothing to take down in order


def run(
    library: Path,
    ranks: int,
    function: Callable,
    *args: Any,
    environment: Callable[[int], dict[str, str]] = lambda rank: {},
    host: Callable[[int], AbstractContextManager] = lambda rank: nullcontext(),
    timeout_s: float = 120.0,
) -> list[Any]:
    """`[function(peer, *args)]` of as many processes; None of one that ends without a value (os._exit).

    environment: of a rank, before the plugin loads. host: the context manager in which its process starts.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Value("i", 0)
    pipes, processes = [], []
    for rank in range(ranks):
        here, there = context.Pipe()
        passed = (there, str(library), rank, ranks, barrier, environment(rank), function, args)
        processes.append(context.Process(target=_entry, args=passed))
        with host(rank):
            processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        handles = [_receive(pipe, timeout_s)[1] for pipe in pipes]
        for pipe in pipes:
            pipe.send(handles)
        got = [_receive(pipe, timeout_s) for pipe in pipes]
        for pipe, (kind, value) in zip(pipes, got, strict=True):
            if kind == "value" and value is not None:
                pipe.send("end")
    finally:
        for process in processes:
            process.join(timeout=2)
            process.kill()
    errors = [f"rank {rank}:\n{value}" for rank, (kind, value) in enumerate(got) if kind == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, value in got]


def _receive(pipe, timeout_s: float) -> tuple[str, Any]:
    if not pipe.poll(timeout_s):
        return "error", f"nothing within {timeout_s:.0f} s"
    try:
        return pipe.recv()
    except EOFError:
        return "value", None

"""What the ranks of tests/test_rma_plugin.py do, each in a process of its own. Imports little: it starts often."""

import contextlib
import ctypes
import os
import random
import threading

from .rma_plugin import CUDA, INC, Memory, Peer, PluginError

ROUNDS, SIZE = 24, 1 << 14


def puts(peer: Peer, sizes: list[int], kind: int = 1) -> bool:
    """Both ranks put at the same time, to where nothing else may be touched."""
    peer.create_context()
    begin, other, right = max(sizes) + 8, 1 - peer.rank, True
    memory = Memory(peer, 2 * max(sizes) + 64, kind)
    for i, size in enumerate(sizes):
        memory[:size] = bytes([1 + peer.rank]) * size
        peer.wait(peer.put(other, memory, 0, size, begin, context=i % 4))
        peer.meet()
        right &= memory[begin - 8 : begin + size + 8] == bytes(8) + bytes([1 + other]) * size + bytes(8)
        peer.meet()
        memory[begin : begin + size] = bytes(size)
    peer.close()
    return right


def signals(peer: Peer, kind: int = 1) -> tuple[int, int]:
    peer.create_context()
    memory = Memory(peer, 64, kind)
    requests = [peer.signal(other, (memory, 0), 5) for other in range(peer.ranks)]
    requests += [peer.signal(other, (memory, 8), 99, INC) for other in range(peer.ranks)]
    peer.wait(*requests)
    peer.meet()
    return memory.word(0), memory.word(8)


def gets(peer: Peer) -> bytes:
    peer.create_context()
    memory = Memory(peer, 64)
    memory[:8] = bytes([65 + peer.rank]) * 8
    peer.meet()
    peer.wait(peer.get((peer.rank + 1) % peer.ranks, memory, 2, 5, 40))
    peer.meet()
    return memory[39:46]


def stride(peer: Peer) -> str:
    peer.create_context(contexts=2, stride=2)
    memory = Memory(peer, 64)
    peer.wait(peer.signal((peer.rank + 2) % 4, (memory, 0)))
    peer.meet()
    assert memory.word(0) == 1
    return str(peer.refused(lambda: peer.signal((peer.rank + 1) % 4, (memory, 0))))


def cuda_copies(peer: Peer) -> tuple[bool, tuple[int, int]]:
    """As puts and signals, over memory that only the driver's functions may touch."""
    right = puts(peer, [8, 3 << 20], CUDA)
    driver = ctypes.CDLL(os.environ["RMA_TCP_LIBCUDA"])
    return right, (driver.copies_to_host(), driver.copies_to_device())


def driver_goes(peer: Peer) -> tuple[bool, str]:
    """Whether progress fails once the driver is shut down, and what it says of another error."""
    peer.create_context()
    Memory(peer, 64, CUDA)
    driver = ctypes.CDLL(os.environ["RMA_TCP_LIBCUDA"])
    driver.shut_down(4)
    for _ in range(3):
        peer.progress()
    failed = peer.failed()
    driver.shut_down(999)
    return failed, str(peer.refused(peer.progress))


def rounds(peer: Peer, seed: int, fault: str) -> int:
    """Unequal numbers of puts of unequal sizes, then a signal on each context. Returns how many rounds were right."""
    peer.create_context(contexts=6)
    memory = Memory(peer, 2 * SIZE + 8 * 6)  # what is sent, what is received, a signal a context
    peer.plugin.fault(fault)
    for step in range(ROUNDS):
        plans = [_plan(seed, step, rank, SIZE) for rank in range(2)]
        for begin, end, context in plans[peer.rank]:
            memory[begin:end] = bytes([(step + begin + peer.rank) % 251]) * (end - begin)
            peer.put(1 - peer.rank, memory, begin, end - begin, SIZE + begin, context)
        for context in range(6):
            peer.signal(1 - peer.rank, (memory, 2 * SIZE + 8 * context), context=context)
        peer.until(lambda: all(memory.word(2 * SIZE + 8 * c) == step + 1 for c in range(6)))  # noqa: B023
        for begin, end, _ in plans[1 - peer.rank]:
            expected = bytes([(step + begin + 1 - peer.rank) % 251]) * (end - begin)
            if memory[SIZE + begin : SIZE + end] != expected:
                return step
        peer.meet()
    return ROUNDS


def bytes_of_rounds(seed: int) -> int:
    """What the puts of both ranks carry."""
    plans = [_plan(seed, step, rank, SIZE) for step in range(ROUNDS) for rank in range(2)]
    return sum(end - begin for plan in plans for begin, end, _ in plan)


def _plan(seed: int, step: int, rank: int, size: int) -> list[tuple[int, int, int]]:
    """Disjoint ranges and their contexts; every rank knows all."""
    draw = random.Random(f"{seed} {step} {rank}")
    cuts = sorted(draw.sample(range(size), 2 * draw.randint(1, 40)))
    return [(a, b, draw.randrange(6)) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]


def beside_a_progress_thread(peer: Peer) -> int:
    """As in NCCL: one thread makes progress, while the application registers memory and creates contexts."""
    peer.create_context()
    ended = threading.Event()

    def progress(context) -> None:
        while not ended.is_set():
            peer.plugin.call("progress", context)

    threads, right = [], 0
    for step in range(6):
        threads.append(threading.Thread(target=progress, args=(peer.context,)))
        threads[-1].start()
        memory = Memory(peer, 4096)
        memory[:1024] = bytes([1 + step + peer.rank]) * 1024
        peer.put(1 - peer.rank, memory, 0, 1024, 1024)
        peer.signal(1 - peer.rank, (memory, 4088))
        while memory.word(4088) != 1:
            pass
        right += memory[1024:2048] == bytes([2 + step - peer.rank]) * 1024
        peer.create_context()  # another one, for the next step
    ended.set()
    for thread in threads:
        thread.join()
    return right


# ---- Faults ----


def reordered(peer: Peer, fault: str) -> bytes:
    peer.create_context()
    memory = Memory(peer, 64)
    peer.plugin.fault(fault)
    if peer.rank == 0:
        memory[:16] = b"first..." + b"second.."
        peer.wait(peer.put(1, memory, 0, 8, 32), peer.put(1, memory, 8, 8, 32), peer.signal(1, (memory, 56)))
    peer.meet()
    return memory[32:40]


def delayed(peer: Peer) -> tuple[int, int, int]:
    """What rank 1 sees of two signals: while the first is delayed, and after."""
    peer.create_context()
    memory = Memory(peer, 64)
    if peer.rank == 0:
        peer.plugin.fault("delay=1000000000@1")
        late = peer.signal(1, (memory, 0), context=1)
        peer.wait(peer.signal(1, (memory, 8), context=0))  # posted later, and there
        assert not peer.done(late)
    peer.meet()
    seen = memory.word(0), memory.word(8)
    peer.meet()
    if peer.rank == 0:
        peer.plugin.fault("")
        peer.wait(late)
    else:
        peer.until(lambda: memory.word(0) == 1)
    return *seen, memory.word(0)


def failure(peer: Peer, fault: str) -> tuple[int, str, bool, int]:
    """What rank 0 is told while it waits for a signal of rank 1, which has the fault, and what later calls say."""
    peer.create_context()
    memory = Memory(peer, 64)
    peer.meet()
    if peer.rank == 1:
        if fault == "killed":
            os._exit(1)
        peer.plugin.fault(fault)
        with contextlib.suppress(PluginError):
            peer.put(0, memory, 0, 8, 8)
            peer.until(lambda: peer.barrier.value > peer.ranks)
        return 0, "", True, 0
    if fault.startswith("silent"):
        peer.signal(1, (memory, 0))
    error = peer.refused(lambda: peer.until(lambda: memory.word(56) == 1))
    peer.barrier.value += 1  # rank 1 may go
    again = peer.refused(lambda: peer.signal(1, (memory, 0)))
    assert memory[:] == bytes(64)
    return error.status, peer.plugin.lines[0], peer.failed(), again.status


def beyond(peer: Peer) -> str:
    """Windows need not be of one size: rank 0 has 64 bytes, rank 1 has 32."""
    peer.create_context()
    memory = Memory(peer, 64 >> peer.rank)
    peer.meet()
    if peer.rank == 1:
        peer.wait(peer.put(0, memory, 0, 8, 56))
    peer.meet()
    return str(peer.refused(lambda: peer.put(1 - peer.rank, memory, 0, 8, 64 >> (1 - peer.rank))))


def misaligned(peer: Peer) -> str:
    peer.create_context()
    memory = Memory(peer, 64)
    return str(peer.refused(lambda: peer.signal(0, (memory, 4))))


def unequal_calls(peer: Peer, alone: bool) -> str:
    if peer.rank == 0:
        return str(peer.refused(lambda: Memory(peer, 64)))
    return "" if alone else str(peer.refused(peer.create_context))


def over_a_cable(peer: Peer, cut) -> tuple[int, str]:
    """Rounds over the cable; then it is pulled, while this rank waits for its peer without having asked anything."""
    right = rounds(peer, 7, "delay=300@0 reorder=2")
    peer.meet()
    cut.set()
    return right, str(peer.refused(lambda: peer.until(lambda: False)))

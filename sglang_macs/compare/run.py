"""The passes of a comparison: every block of requests in every arm, in turn, under the same load."""

import itertools
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ..console import say
from ..errors import MacsError
from ..observe.server_info import Server
from .answers import Kept, Pass, ask
from .arms import ARMS, OneServer, TwoServers
from .requests import Request

SEED = 0
BLOCKS = 12  # that are wanted at least; with 11 both measures can find a loss (statistics.fewest_blocks)
ROUNDS = 2  # a block has so many times the requests that run at once, where there are enough

T, U = TypeVar("T"), TypeVar("U")


def blocks_of(requests: Sequence[Request], concurrency: int) -> list[list[Request]]:
    """Blocks of requests, mixed anew (always alike): a file may be sorted, traffic is not."""
    mixed = list(requests)
    random.Random(SEED).shuffle(mixed)
    size = max(concurrency, min(ROUNDS * concurrency, len(mixed) // BLOCKS))
    count = max(1, len(mixed) // size)
    ends = [len(mixed) * k // count for k in range(count + 1)]
    return [mixed[a:b] for a, b in itertools.pairwise(ends)]


def passes_of(count: int) -> Iterator[tuple[int, str]]:
    """(block, arm) in the order to run them. The arms of a block come in a random order, so that none is always the
    first: under no effect at all they could change names.
    """
    for block in range(count):
        order = list(ARMS)
        random.Random(f"{SEED} {block}").shuffle(order)
        yield from ((block, arm) for arm in order)


def run(
    servers: OneServer | TwoServers,
    models: dict[Server, str],
    blocks: Sequence[Sequence[Request]],
    concurrency: int,
    kept: Kept,
) -> None:
    """Asks for every pass that `kept` has not yet."""
    missing = [one for one in passes_of(len(blocks)) if one not in kept.passes]
    if not missing:
        return
    salt = uuid.uuid4().hex
    for server in dict.fromkeys(servers.take(arm) for arm in ARMS):  # a first picture takes longer than all others
        at_once(blocks[0], lambda r, server=server: ask(server, models[server], r, f"{salt} warm"), concurrency)
    for block, arm in missing:
        kept.add(_pass(servers, models, block, arm, blocks[block], concurrency, f"{salt} {block} {arm}"))
        done = len(kept.passes)
        last = kept.passes[block, arm]
        say(f"pass {done} of {len(ARMS) * len(blocks)}, {arm}: {len(last.answers)} answers in {last.seconds:.1f} s")
    if all(answer.refused for one in kept.passes.values() for answer in one.answers):
        first = next(iter(kept.passes.values())).answers[0]
        raise MacsError("server", f"every request refused: {first.refused}", "requests that it takes")


def _pass(
    servers: OneServer | TwoServers,
    models: dict[Server, str],
    block: int,
    arm: str,
    requests: Sequence[Request],
    concurrency: int,
    salt: str,
) -> Pass:
    server = servers.take(arm)
    before = servers.counters(arm)
    start = time.monotonic()
    answers = at_once(requests, lambda request: ask(server, models[server], request, salt), concurrency)
    seconds = time.monotonic() - start
    if isinstance(servers, OneServer):
        servers.check(arm)
    after = servers.counters(arm)
    counted = after.since(before) if after is not None and before is not None else None
    return Pass(block, arm, tuple(answers), counted, seconds)


def at_once(jobs: Sequence[T], work: Callable[[T], U], concurrency: int) -> list[U]:
    """What `work` makes of each job, so many at a time, in the order of the jobs. Raises what a job raised; then, and
    when the waiting is interrupted, no further job begins, and nobody waits for those under way.
    """
    results: dict[int, U] = {}
    failures: list[BaseException] = []
    todo, lock, stop = iter(range(len(jobs))), threading.Lock(), threading.Event()

    def worker() -> None:
        while not stop.is_set():
            with lock:
                number = next(todo, None)
            if number is None:
                return
            try:
                results[number] = work(jobs[number])
            except BaseException as error:  # raised again below, where somebody sees it
                failures.append(error)
                stop.set()

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(concurrency, len(jobs)))]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not failures:
            for thread in threads:
                thread.join(0.05)
    finally:
        stop.set()
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(jobs))]


def complete(kept: Kept, blocks: Sequence[Sequence[Request]]) -> list[int]:
    """Blocks that have all of their arms, each with an answer a request."""
    return [
        number
        for number, block in enumerate(blocks)
        if all((one := kept.passes.get((number, arm))) is not None and len(one.answers) == len(block) for arm in ARMS)
    ]

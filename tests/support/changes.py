"""What tests that change a server's options under load share: the load, what is changed, and what must come of it."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.questions import QUESTIONS, Question
from benchmarks.serving import data_uri, photograph_files
from tests.support.servers import MACS
from tests.support.waiting import wait_for

# No prefix cache: it would hand keys and values that were computed under one set of options to requests under another.
EVERY_PASS = ["--macs-min-tokens", "0", "--macs-act", "always", "--disable-radix-cache"]
FLAGS = [*MACS, "--macs-gamma", "1.0", *EVERY_PASS]
# It ends with MACS off, with which the next round begins; between, it plans in another way every time.
ROUND = (["--on", "--gamma", "1.05"], ["--preset", "paper"], ["--off"],
         ["--on", "--gamma", "1"], ["--importance", "entropy"], ["--preset", "off"],
         ["--preset", "cai", "--verify", "false"], ["--verify-every", "4", "--preset", "rank"], ["--off"],
         ["--min-tokens", "4"], ["--on"], ["--off"])  # fmt: skip
AT_ONCE = 16  # requests

Answer = tuple[float, float, Question, list[int]]  # when it was asked and there, by the monotonic clock; its tokens


def picture_of(question: Question) -> list[str] | None:
    """As the servers here take it."""
    return [data_uri(photograph_files()[question.image])] if question.image else None


class Load:
    """So many requests at a time until it is left. ask: one question's tokens."""

    def __init__(self, ask: Callable[[Question], list[int]]) -> None:
        self.answers: list[Answer] = []
        self._send, self._over, self._pool = ask, threading.Event(), ThreadPoolExecutor(AT_ONCE)

    def __enter__(self) -> "Load":
        self._workers = [self._pool.submit(self._ask, i) for i in range(AT_ONCE)]
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        for worker in self._workers:
            worker.result()  # raises what went wrong with a request

    def wait_for_one_since(self, begin: float) -> None:
        """Until a request that was asked from `begin` on has its answer."""
        wait_for(lambda: any(asked >= begin for asked, *_ in self.answers))

    def _ask(self, first: int) -> None:
        for question in itertools.islice(itertools.cycle(QUESTIONS), first % len(QUESTIONS), None):
            if self._over.is_set():
                return
            asked = time.monotonic()
            ids = self._send(question)
            self.answers.append((asked, time.monotonic(), question, ids))


def change_under_load(
    changes: int,
    ask: Callable[[Question], list[int]],
    change: Callable[[list[str]], int],
    states: Callable[[], list[dict]],
) -> list[Answer]:
    """Answers to requests within whose whole time MACS was off. change: `sglang-macs set` with these options."""
    off, since = [], None  # spans in which MACS was off
    with Load(ask) as load:
        for number in range(changes):
            if since is not None:
                load.wait_for_one_since(since)
                off.append((since, time.monotonic()))
            assert change([*ROUND[number % len(ROUND)], "--wait", "60"]) == 0
            is_off = {state["config"]["preset"] == "off" for state in states()}
            assert len(is_off) == 1
            since = time.monotonic() if is_off == {True} else None
    within = [one for one in load.answers if any(a <= one[0] and one[1] <= b for a, b in off)]
    assert len(within) >= len(off) >= changes // 4
    return within


def assert_all_ranks_changed_alike(states: list[dict], changes: int) -> None:
    """Each rank has applied as many, and those that are still shown before the same passes."""
    first, *others = (state["control"] for state in states)
    assert first["received"] == first["applied"] == changes and not first["refused"]
    assert others and all(other == first for other in others)
    passes = [at for _, at in first["changes"]]
    assert passes == sorted(passes) and len(set(passes)) > 1
    for state in states:
        assert state["changes"] == changes and state["planned"] > 0
        assert state["misaligned"] == 0 and not any(state["violations"].values())

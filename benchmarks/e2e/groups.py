"""What measurements of whole servers have in common: groups of servers that take turns, time shares, the result file.

prefill.py and decode.py say what a cell is, what a round of it asks, and what is made of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import requests

from benchmarks.e2e import common_options, servers, standstill
from benchmarks.e2e.rounds import ROUND_SECONDS, WARM_UP_SECONDS, Client, Run
from benchmarks.e2e.servers import Launch, Variant
from benchmarks.gpu import mps
from benchmarks.serving import Server, ServerError

FEWEST_ROUNDS = 7  # six bound a median, and one may be left out
WORTH_STARTING = 90  # seconds for a further group; its servers need most of them


class Report:
    """The result file: rows by case, outliers, servers that were lost; written after every cell."""

    program: str  # its name in what is printed

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: dict[str, dict] = {}
        self.outliers: list[dict] = []
        self.lost: list[dict] = []

    def case(self, variant: Variant, cell: Any) -> dict:
        """What a row's figures were measured of."""
        raise NotImplementedError

    def put(self, row: dict) -> None:
        """Stock and its balanced twin run in every group: the first one's row stays."""
        self.rows.setdefault(json.dumps(row["case"]), row)

    def add(self, variant: Variant, cell: Any, found: dict) -> None:
        """Into the row that is there."""
        if row := self.rows.get(json.dumps(self.case(variant, cell))):
            row.update(found)

    def has(self, variant: Variant, cell: Any, name: str) -> bool:
        """Whether the row is there and its `name` known."""
        return self.rows.get(json.dumps(self.case(variant, cell)), {}).get(name) is not None

    def write(self) -> None:
        rest = {"rows": list(self.rows.values()), "outliers": self.outliers, "lost": self.lost}
        common_options.write(self.options.out, common_options.header(self.options) | rest)


@contextlib.contextmanager
def running(
    program: str, group: list[Variant], launch: Launch, model: Path, stagger: float
) -> Iterator[dict[tuple, Client]]:
    """Clients by the flags of their servers, which start side by side. One that does not is left out, unless it is
    stock SGLang: then ServerError is raised.
    """
    servers_of: dict[tuple, tuple[Server, Path]] = {}
    for variant in group:
        if variant.flags not in servers_of:
            folder = servers.BUILD / f"{variant.dispatch}-{variant.name}"
            servers_of[variant.flags] = launch.server(variant, model, folder), folder

    def start(place: int, server: Server) -> None:
        time.sleep(place * stagger)
        server.__enter__()

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(servers_of)) as pool:
        jobs, clients = {}, {}
        for place, (flags, (server, _)) in enumerate(servers_of.items()):
            stack.callback(server.stop)
            jobs[flags] = pool.submit(start, place, server)
        for flags, (server, folder) in servers_of.items():
            try:
                jobs[flags].result()
                clients[flags] = Client(server, folder / "passes")
            except ServerError as error:
                if flags == group[0].flags:
                    raise
                print(f"{program}: left out, {error}", flush=True)
        print(f"{program}: {len(clients)} servers up", flush=True)
        yield clients


class Group:
    """Measures the cells of one group of variants, whose servers take turns."""

    def __init__(self, variants: list[Variant], clients: dict[tuple, Client], launch: Launch, report: Report) -> None:
        self.variants = [variant for variant in variants if variant.flags in clients]
        self.clients, self.launch, self.report, self.options = dict(clients), launch, report, report.options
        self._running: tuple | None = None  # flags of the one server that is not paused

    def workload(self, cell: Any) -> Any:
        """What a round of the cell asks of a server."""
        raise NotImplementedError

    def ready(self, variant: Variant, cell: Any) -> Client:
        """The variant's server, set to the cell."""
        raise NotImplementedError

    def report_cell(self, cell: Any, runs: dict[Variant, list[Run]], host_us: dict[Variant, float | None]) -> None:
        """Puts the cell's rows into the report. host_us: of a plan, for each layer of a pass."""
        raise NotImplementedError

    def turn_of(self, variant: Variant) -> Client:
        """The variant's server, while all others are paused: idle ranks poll one another and keep cores busy, which no
        server has beside it in service.
        """
        if self._running != variant.flags:
            for flags, client in self.clients.items():
                if flags != variant.flags:
                    client.server.pause()
            self.clients[variant.flags].server.resume()
            self._running = variant.flags
        return self.clients[variant.flags]

    def drop(self, variant: Variant, error: ServerError) -> None:
        """Goes on without the variants of a server that failed, which may still keep a GPU busy. Raises the error where
        that is stock SGLang.
        """
        if variant.flags == self.variants[0].flags:
            raise error
        server = self.clients[variant.flags].server
        del self.clients[variant.flags]
        found = standstill.look(server)
        print(f"{self.report.program}: left out from here on, {error}\n{found}", flush=True)
        own = {"variant": variant.name, "dispatch": variant.dispatch}
        self.report.lost.append({**own, "error": str(error), "found": found.splitlines()})
        server.stop()
        self.variants = [other for other in self.variants if other.flags != variant.flags]

    def measure(self, cell: Any, until: float, end: float) -> None:
        """Rounds, the first ones to warm up, until the clock says `until`: at least seven, unless it says `end`."""
        body = self.workload(cell).body()
        runs: dict[Variant, list[Run]] = {variant: [] for variant in self.variants}
        counted = {}
        for turn in range(-self.options.warm_ups, self.options.rounds):
            if turn == 0:
                counted = {v: self.turn_of(v).counters() for v in self.variants}
            if turn > 0 and time.monotonic() > (until if turn >= FEWEST_ROUNDS else end):
                break
            for variant in self.variants if turn % 2 == 0 else self.variants[::-1]:
                if variant not in self.variants:
                    continue
                try:
                    run = self.ready(variant, cell).run(body, WARM_UP_SECONDS if turn < 0 else ROUND_SECONDS)
                except ServerError as error:
                    self.drop(variant, error)
                    continue
                if turn >= 0:
                    runs[variant].append(run)
        runs = {variant: runs[variant] for variant in self.variants}
        self.report_cell(cell, runs, {variant: self.host_us(variant, counted[variant]) for variant in runs})

    def host_us(self, variant: Variant, before: tuple[float, int]) -> float | None:
        """Microseconds that a plan took of the host, for each layer of a pass. None where nothing was planned."""
        seconds, plans = (now - then for now, then in zip(self.turn_of(variant).counters(), before, strict=True))
        return 1e6 * seconds / plans if plans else None


def in_shares(
    program: str, things: list, end: float, least: float = 0.0, words: Callable = str
) -> Iterator[tuple[Any, float]]:
    """Each of them with the moment until which it may take: equal shares, for those left, of the time until `end`. What
    would get less than `least` seconds is left out, and said so in `words`, but for the first.
    """
    for place, thing in enumerate(things):
        share = (end - time.monotonic()) / (len(things) - place)
        if place and share < least:
            print(f"{program}: no time for {words(thing)}", flush=True)
        else:
            yield thing, time.monotonic() + share


def sharing(options: argparse.Namespace, groups: list[list[Variant]]) -> AbstractContextManager[dict[str, str]]:
    """The environment of servers whose ranks share a GPU, or nothing. Each rank has SMs of its own, idle servers' ranks
    too: a cooperative kernel that waits for one on which another rank waits for it would wait for ever.
    """
    clients = options.ranks * servers.side_by_side(groups)
    return mps.shared_gpu(clients) if options.share_gpu else nullcontext({})


def _names(group: list[Variant]) -> str:
    return ", ".join(variant.name for variant in group)


def run(
    report: Report,
    groups: list[list[Variant]],
    launch_of: Callable[[argparse.Namespace, dict[str, str]], Launch],
    measure_group: Callable[[list[Variant], Launch, Path, Report, float], None],
) -> int:
    """Measures all groups within the minutes that the options give, and returns the program's exit status.

    launch_of: of the options and the environment of servers whose ranks share a GPU. measure_group: what runs side by
    side, its launch, the model, the report and the moment until which it may take.
    """
    options = report.options
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ended from outside, servers end, too
    with sharing(options, groups) as client:
        end = time.monotonic() + 60 * options.minutes
        launch = launch_of(options, client)
        model = servers.build_model(options.layers, options.dtype, real=options.device == "cuda")
        for group, until in in_shares(report.program, groups, end, WORTH_STARTING, _names):
            try:
                measure_group(group, launch, model, report, until)
            except (ServerError, requests.RequestException) as error:  # what other groups measure stays
                print(f"{report.program}: a group failed, {error}", flush=True)
    found = f"{len(report.rows)} rows, {len(report.outliers)} rounds left out"
    print(f"{report.program}: {found}, in {options.out}")
    return 0 if report.rows else 1

"""Prefill throughput and time to first token of a real server, end to end: SGLang alone against every variant of MACS.

    python3 -m benchmarks.e2e.prefill --out docs/results/e2e_prefill_h200x2.json --ranks 2 --minutes 9

A model of Qwen3-VL-30B-A3B's dimensions with dummy weights, a GPU a rank, attention data-parallel, experts split. The
servers of a group (servers.py has the table of variants) are up side by side and take turns: a round is the same
prompts on each of them, every pass of a rank as full as asked for. Routing is set by a plugin that all servers load
(routing_site): spread over layers as published, hot ranks alternate; uniform; perfectly balanced, which is the ideal.
Ratios are medians over paired rounds; runs that took long are listed with what the log says about them. FILE is
written after every size, the most telling first; --minutes bounds the whole run. On one GPU: --share-gpu.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from benchmarks.e2e import common_options, kernel_trace, servers, standstill, summary
from benchmarks.e2e.rounds import ROUND_SECONDS, WARM_UP_SECONDS, Client, Run, Workload
from benchmarks.e2e.servers import Launch, Variant
from benchmarks.e2e.summary import Samples
from benchmarks.gpu import mps
from benchmarks.serving import Server, ServerError

TOKENS = [8192, 4096, 16384, 2048, 512]  # a rank and pass, the most telling first
SKEWS = [1.27, 1.0]  # maximum over mean of the ranks, mean of the layers; 1 is uniform
FEWEST_ROUNDS = 7  # six bound a median, and one may be left out
PROFILED = ("stock", "off", "rank-1.05")
PROFILE_SECONDS = 12  # what a profile takes, reserved at a group's end
WORTH_STARTING = 90  # seconds for a further group; its servers need most of them
EPOCH = time.time() - time.perf_counter()


@dataclass(frozen=True)
class Cell:
    """What is measured side by side: one size, one routing."""

    tokens: int
    skew: float


class Report:
    """The result file: rows by case, outliers, servers that were lost; written after every cell."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: dict[str, dict] = {}
        self.outliers: list[dict] = []
        self.lost: list[dict] = []

    def case(self, variant: Variant, cell: Cell) -> dict:
        own = {"variant": variant.name, "dispatch": variant.dispatch}
        fixed = {name: getattr(self.options, name) for name in ("layers", "dtype", "ranks", "prompts")}
        return {"tokens": cell.tokens, "skew": cell.skew, **own, **fixed}

    def put(self, row: dict) -> None:
        """Stock and its balanced twin run in every group: the first one's row stays."""
        self.rows.setdefault(json.dumps(row["case"]), row)

    def add(self, variant: Variant, cell: Cell, found: dict) -> None:
        """Into the row that is there."""
        if row := self.rows.get(json.dumps(self.case(variant, cell))):
            row.update(found)

    def has(self, variant: Variant, cell: Cell, name: str) -> bool:
        """Whether the row is there and its `name` known."""
        return self.rows.get(json.dumps(self.case(variant, cell)), {}).get(name) is not None

    def write(self) -> None:
        rest = {"rows": list(self.rows.values()), "outliers": self.outliers, "lost": self.lost}
        common_options.write(self.options.out, common_options.header(self.options) | rest)


# ---- One group of servers ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(group: list[Variant], launch: Launch, model: Path, stagger: float) -> Iterator[dict[tuple, Client]]:
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
                print(f"prefill: left out, {error}", flush=True)
        yield clients


class Group:
    """Measures the cells of one group of variants."""

    def __init__(self, variants: list[Variant], clients: dict[tuple, Client], launch: Launch, report: Report) -> None:
        self.variants = [variant for variant in variants if variant.flags in clients]
        self.clients, self.launch, self.report, self.options = dict(clients), launch, report, report.options
        self._running: tuple | None = None  # flags of the one server that is not paused

    def workload(self, cell: Cell) -> Workload:
        return workload(self.options, cell.tokens)

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

    def ready(self, variant: Variant, cell: Cell) -> Client:
        """The variant's server, set to the cell."""
        client = self.turn_of(variant)
        routing = 0 if variant.balanced else 1 + self.options.skews.index(cell.skew)
        client.choose(routing, cell.tokens)
        return client

    def drop(self, variant: Variant, error: ServerError) -> None:
        """Goes on without the variants of a server that failed, which may still keep a GPU busy. Raises the error where
        that is stock SGLang.
        """
        if variant.flags == self.variants[0].flags:
            raise error
        server = self.clients[variant.flags].server
        del self.clients[variant.flags]
        found = standstill.look(server)
        print(f"prefill: left out from here on, {error}\n{found}", flush=True)
        own = {"variant": variant.name, "dispatch": variant.dispatch}
        self.report.lost.append({**own, "error": str(error), "found": found.splitlines()})
        server.stop()
        self.variants = [other for other in self.variants if other.flags != variant.flags]

    def measure(self, cell: Cell, until: float, end: float) -> None:
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

    def report_cell(self, cell: Cell, runs: dict[Variant, list[Run]], host_us: dict[Variant, float | None]) -> None:
        samples = {}
        for variant, of_variant in runs.items():
            own = Samples([r.seconds for r in of_variant], [r.ttft for r in of_variant])
            samples[variant], outliers = own.without_outliers()
            for place in outliers:
                self.report.outliers.append(self.explain(variant, cell, place, of_variant[place], samples[variant]))
        stock = samples[self.variants[0]]
        work = self.workload(cell)
        for variant, own in samples.items():
            if not summary.ratios(own.seconds, stock.seconds):
                continue
            seconds = own.median_seconds()
            rest = {
                "host_us_per_layer": host_us[variant],
                "pass_ms": 1e3 * seconds / work.passes,
                "tokens_per_s": work.tokens * work.passes * work.ranks / seconds,
                "full": sum(run.full(work) for run in runs[variant]),
            }
            ideal, off = (self.twin(samples, variant, name) for name in ("balanced", "off"))
            self.report.put(summary.row(self.report.case(variant, cell), own, stock, ideal, off, rest))
            where = f"{cell.tokens} tokens, skew {cell.skew:g}, {variant.dispatch} {variant.name}"
            print(f"prefill: {where}: {rest['pass_ms']:.2f} ms a pass", flush=True)
        self.report.write()

    @staticmethod
    def twin(samples: dict[Variant, Samples], variant: Variant, name: str) -> Samples | None:
        """Those of the variant called `name` under the same dispatch."""
        return next((own for v, own in samples.items() if (v.name, v.dispatch) == (name, variant.dispatch)), None)

    def explain(self, variant: Variant, cell: Cell, place: int, run: Run, kept: Samples) -> dict:
        full = run.full(self.workload(cell))
        found = summary.reasons(run, full, self.launch.caches(), EPOCH + run.sent, EPOCH + run.answered)
        own = {"round": place, "seconds": run.seconds, "median": kept.median_seconds(), "found": found}
        return {"case": self.report.case(variant, cell), **own}

    def to_profile(self, cell: Cell) -> list[Variant]:
        """Those that were not profiled in an earlier group."""
        return [v for v in self.variants if v.name in PROFILED and not self.report.has(v, cell, "busy")]

    def profile(self, cell: Cell) -> None:
        """`busy` of one round of the cell, into the rows that are there."""
        body = self.workload(cell).body()
        activity = "CPU" if self.options.device == "cpu" else "GPU"
        for variant in self.to_profile(cell):
            folder = servers.BUILD / "traces" / f"{variant.dispatch}-{variant.name}-{time.time():.0f}"
            folder.mkdir(parents=True)
            files = self.ready(variant, cell).profile(body, folder, activity, self.options.ranks)
            if found := kernel_trace.of_ranks(files):
                self.report.add(variant, cell, found)
        self.report.write()


# ---- The whole run -------------------------------------------------------------------------------------------------


def workload(options: argparse.Namespace, tokens: int) -> Workload:
    return Workload.of(tokens, options.prompt_tokens, options.ranks, options.prompts == "images", options.passes)


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


def measure_groups(program: str, groups: list[list[Variant]], end: float, measure_one: Callable) -> None:
    """measure_one: of a group, and the moment until which it may take."""
    for group, until in in_shares(program, groups, end, WORTH_STARTING, lambda group: [v.name for v in group]):
        try:
            measure_one(group, until)
        except (ServerError, requests.RequestException) as error:  # what other groups measure stays
            print(f"{program}: a group failed, {error}", flush=True)


def sharing(options: argparse.Namespace, groups: list[list[Variant]]) -> AbstractContextManager[dict[str, str]]:
    """The environment of servers whose ranks share a GPU, or nothing. Each rank has SMs of its own, idle servers' ranks
    too: a cooperative kernel that waits for one on which another rank waits for it would wait for ever.
    """
    clients = options.ranks * servers.side_by_side(groups)
    return mps.shared_gpu(clients) if options.share_gpu else nullcontext({})


def measure_group(group: list[Variant], launch: Launch, model: Path, report: Report, until: float) -> None:
    """All cells of a group, in time shares that are equal for those left."""
    options = report.options
    cells = [Cell(tokens, skew) for skew in options.skews for tokens in options.tokens]
    profiled = next((c for c in cells if c.tokens == options.profile_tokens), None)
    with running(group, launch, model, options.stagger) as clients:
        print(f"prefill: {len(clients)} servers up", flush=True)
        measuring = Group(group, clients, launch, report)
        end = until - (PROFILE_SECONDS * len(measuring.to_profile(profiled)) if profiled else 0)
        for cell, its_end in in_shares("prefill", cells, end):
            measuring.measure(cell, its_end, end)
        if profiled:
            measuring.profile(profiled)


def launch_of(options: argparse.Namespace, client: dict[str, str]) -> Launch:
    return Launch(
        device=options.device,
        ranks=options.ranks,
        layers=options.layers,
        dtype=options.dtype,
        tokens=max(options.tokens),
        requests=max(workload(options, tokens).prompts for tokens in options.tokens),
        routings=servers.routings(options.layers, options.skews),
        pictures=options.prompts == "images",
        prefill_graphs=options.prefill_graphs,
        attention=options.attention,
        deepep_mode=options.deepep_mode,
        share_gpu=options.share_gpu,
        client=client,
        cache=options.cache,
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_options.parser_of(__doc__, 24)
    common_options.add_variants(parser, 4, "beside stock and balanced; all that this version has")
    parser.add_argument("--prompts", choices=("text", "images"), default="text")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of a rank's pass, in the order measured")
    parser.add_argument("--skews", type=float, nargs="+", default=SKEWS, help="maximum over mean; 1 is uniform")
    parser.add_argument("--dispatch", nargs="+", help="only these; all that this version has")
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="tokens of a prompt, at most")
    parser.add_argument("--passes", type=int, help="of a round; 4 to 16, by size")
    parser.add_argument("--profile-tokens", type=int, default=8192, help="size that is profiled for `busy`; 0: none")
    parser.add_argument("--deepep-mode", choices=("normal", "low_latency"), default="normal")
    parser.add_argument("--prefill-graphs", action="store_true", help="breakable prefill CUDA graphs in every server")
    options = common_options.parse(parser, argv)
    for tokens in options.tokens:
        prompt = min(tokens, options.prompt_tokens)
        if tokens % prompt:
            parser.error(f"--tokens {tokens} is no multiple of --prompt-tokens {prompt}: a pass would not be full")
    return options


def groups_of(options: argparse.Namespace) -> list[list[Variant]]:
    """What runs side by side."""
    return servers.grouped(servers.chosen_variants(options.variants, options.dispatch, options.device), options.at_once)


def measure(options: argparse.Namespace, client: dict[str, str]) -> Report:
    """All groups. client: environment of the servers, where ranks share a GPU."""
    end = time.monotonic() + 60 * options.minutes
    launch, report = launch_of(options, client), Report(options)
    model = servers.build_model(options.layers, options.dtype, real=options.device == "cuda")
    measure_groups(
        "prefill", groups_of(options), end, lambda group, until: measure_group(group, launch, model, report, until)
    )
    return report


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ended from outside, servers end, too
    with sharing(options, groups_of(options)) as client:
        report = measure(options, client)
    print(f"prefill: {len(report.rows)} rows, {len(report.outliers)} outlying runs, in {options.out}")
    return 0 if report.rows else 1


if __name__ == "__main__":
    sys.exit(main())

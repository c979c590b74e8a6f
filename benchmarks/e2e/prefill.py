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
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.e2e import common_options, groups, kernel_trace, servers, summary
from benchmarks.e2e.rounds import Client, Run, Workload
from benchmarks.e2e.servers import Launch, Variant
from benchmarks.e2e.summary import Samples

TOKENS = [8192, 4096, 16384, 2048, 512]  # a rank and pass, the most telling first
SKEWS = [1.27, 1.0]  # maximum over mean of the ranks, mean of the layers; 1 is uniform
PROFILED = ("stock", "off", "rank-1.05")
PROFILE_SECONDS = 12  # what a profile takes, reserved at a group's end
EPOCH = time.time() - time.perf_counter()


@dataclass(frozen=True)
class Cell:
    """What is measured side by side: one size, one routing."""

    tokens: int
    skew: float


class Report(groups.Report):
    """The result file of prefill."""

    program = "prefill"

    def case(self, variant: Variant, cell: Cell) -> dict:
        own = {"variant": variant.name, "dispatch": variant.dispatch}
        fixed = {name: getattr(self.options, name) for name in ("layers", "dtype", "ranks", "prompts")}
        return {"tokens": cell.tokens, "skew": cell.skew, **own, **fixed}


class Group(groups.Group):
    """Measures the cells of one group of variants."""

    def workload(self, cell: Cell) -> Workload:
        return workload(self.options, cell.tokens)

    def ready(self, variant: Variant, cell: Cell) -> Client:
        """The variant's server, set to the cell."""
        client = self.turn_of(variant)
        routing = 0 if variant.balanced else 1 + self.options.skews.index(cell.skew)
        client.choose(routing, cell.tokens)
        return client

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


def workload(options: argparse.Namespace, tokens: int) -> Workload:
    return Workload.of(tokens, options.prompt_tokens, options.ranks, options.prompts == "images", options.passes)


def measure_group(group: list[Variant], launch: Launch, model: Path, report: Report, until: float) -> None:
    """All cells of a group, in time shares that are equal for those left."""
    options = report.options
    cells = [Cell(tokens, skew) for skew in options.skews for tokens in options.tokens]
    profiled = next((c for c in cells if c.tokens == options.profile_tokens), None)
    with groups.running(report.program, group, launch, model, report.options.stagger) as clients:
        measuring = Group(group, clients, launch, report)
        end = until - (PROFILE_SECONDS * len(measuring.to_profile(profiled)) if profiled else 0)
        for cell, its_end in groups.in_shares(report.program, cells, end):
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


def main() -> int:
    options = parse()
    return groups.run(Report(options), groups_of(options), launch_of, measure_group)


if __name__ == "__main__":
    sys.exit(main())

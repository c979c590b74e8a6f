"""Time between tokens and output throughput of a real server in decode: SGLang alone against the fused dispatch.

    python3 -m benchmarks.e2e.decode --out docs/results/e2e_decode_h200x2.json --ranks 2 --minutes 9

The model, servers and turns of prefill.py, as users decode: `--deepep-mode auto`, decode CUDA graphs. A round is one
request of as many prompts as --requests says for each rank: all are prefilled, then decode together until all have
their tokens. Nothing is clipped (infinite gamma), so that every server answers the same. ITL is the time between the
starts of a rank's decode passes, without the first ones; TTFT the time from the first prefill pass to the first decode
pass. FILE is written after every size, the most telling first. On one GPU: --share-gpu.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.check_serving import interval
from benchmarks.e2e import common_options, groups, servers, summary
from benchmarks.e2e.rounds import FIRST_ID, LAST_ID, Client, Run
from benchmarks.e2e.servers import COUNTED, INFINITE, MACS, STOCK, Launch, Variant
from benchmarks.e2e.summary import Samples

REQUESTS = [32, 128, 64, 8, 1]  # running of each rank, the most telling first
SETTLE = 4  # decode passes that are not counted: the last prefills end, and the overlapped schedule begins
# `auto` is the default, which prefills under the bounded dispatch, too. The last shows what the plugin costs beside
# DeepEP's own kernels.
VARIANTS = (
    Variant("stock", "deepep", STOCK),
    Variant("auto", "auto", (*MACS, *INFINITE)),
    Variant("fused", "fused", (*MACS, *INFINITE, "--macs-dispatch", "fused")),
    Variant("inf", "deepep", (*COUNTED, *INFINITE)),
)


def chosen_variants(names: list[str] | None, device: str) -> list[Variant]:
    """Those asked for; stock is always the first. On a CPU there is one dispatch, and the preset off stands for it."""
    if device == "cpu":
        variants = [Variant("stock", "gloo", (*MACS, *servers.OFF)), Variant("inf", "gloo", (*MACS, *INFINITE))]
    else:
        variants = list(VARIANTS)
    return variants[:1] + [v for v in variants[1:] if names is None or v.name in names]


@dataclass(frozen=True)
class Workload:
    """requests: running of each rank; prompt and output: tokens of each."""

    requests: int
    ranks: int
    prompt: int
    output: int

    def body(self) -> dict:
        """Of POST /generate. Dealt round-robin over the ranks, as SGLang does."""
        rng = random.Random(self.requests)
        count = self.requests * self.ranks
        sampling = {"max_new_tokens": self.output, "ignore_eos": True, "temperature": 0}
        ids = [[rng.randrange(FIRST_ID, LAST_ID) for _ in range(self.prompt)] for _ in range(count)]
        return {"sampling_params": sampling, "input_ids": ids}


@dataclass(frozen=True)
class Decoded:
    """One round as decode has it, in seconds; None where a rank did not decode in one go."""

    itl: float
    ttft: float


def decoded(run: Run, workload: Workload) -> Decoded | None:
    """Of the slowest rank. A prefill between the decode passes, or fewer of these than tokens, spoils a round."""
    itls, ttfts = [], []
    for rank in run.passes:
        prefills = [start for start, tokens in rank if tokens]
        decodes = [start for start, tokens in rank if not tokens and prefills and start > prefills[0]]
        if not decodes or decodes[0] < prefills[-1] or len(decodes) < workload.output - 1:
            return None
        decodes = decodes[: workload.output - 1]  # idle passes may follow
        counted = decodes[min(SETTLE, len(decodes) - 2) :]
        itls.append((counted[-1] - counted[0]) / (len(counted) - 1))
        ttfts.append(decodes[0] - prefills[0])
    return Decoded(max(itls), max(ttfts)) if itls else None


@dataclass(frozen=True)
class Cell:
    """What is measured side by side."""

    requests: int


def row(case: dict, samples: Samples, stock: Samples, rest: dict) -> dict:
    """One row: `seconds` of the samples are ITLs."""
    itl, ttft = (interval(summary.ratios(getattr(samples, k), getattr(stock, k))) for k in ("seconds", "ttft"))
    return {
        "op": "e2e_decode",
        "case": case,
        "against": "stock",
        "ratio": itl.median,
        "ci95": summary.bounds(itl),
        "ttft_ratio": ttft.median,
        "ttft_ci95": summary.bounds(ttft),
        "rounds": itl.pairs,
        **rest,
    }


class Report(groups.Report):
    """The result file of decode."""

    program = "decode"

    def case(self, variant: Variant, cell: Cell) -> dict:
        own = {"requests": cell.requests, "variant": variant.name, "dispatch": variant.dispatch}
        names = ("layers", "dtype", "ranks", "prompt_tokens", "output_tokens")
        return own | {name: getattr(self.options, name) for name in names}


class Group(groups.Group):
    """Measures the sizes of one group of variants."""

    def workload(self, cell: Cell) -> Workload:
        return workload(self.options, cell.requests)

    def ready(self, variant: Variant, cell: Cell) -> Client:
        client = self.turn_of(variant)
        client.choose(0, self.launch.tokens)
        return client

    def report_cell(self, cell: Cell, runs: dict[Variant, list[Run]], host_us: dict[Variant, float | None]) -> None:
        work, samples = self.workload(cell), {}
        for variant, of_variant in runs.items():
            found = [decoded(run, work) for run in of_variant]
            samples[variant] = Samples([d and d.itl for d in found], [d and d.ttft for d in found])
            samples[variant] = self.settled(variant, cell, samples[variant], of_variant)
        stock = samples[self.variants[0]]
        for variant, own in samples.items():
            if not summary.ratios(own.seconds, stock.seconds):
                continue
            itl = own.median_seconds()
            rest = {
                "itl_ms": 1e3 * itl,
                "output_tokens_per_s": work.requests * work.ranks / itl,
                "ttft_ms": 1e3 * statistics.median(t for t in own.ttft if t is not None),
            }
            self.report.put(row(self.report.case(variant, cell), own, stock, rest))
            print(f"decode: {cell.requests} requests, {variant.name}: {rest['itl_ms']:.3f} ms", flush=True)
        self.report.write()

    def settled(self, variant: Variant, cell: Cell, samples: Samples, runs: list[Run]) -> Samples:
        """Without the rounds that decoded in more than one go, and without outlying ones; both are listed."""
        spoilt = [i for i, seconds in enumerate(samples.seconds) if seconds is None]
        kept = [i for i in range(len(runs)) if i not in spoilt]
        outlying = Samples([samples.seconds[i] for i in kept], []).without_outliers()[1]
        left_out = spoilt + [kept[i] for i in outlying]
        for i in left_out:
            sizes = summary.pass_sizes(runs[i].passes)
            found = [f"not decoded in one go: {sizes}"] if i in spoilt else ["took long"]
            own = {"round": i, "seconds": samples.seconds[i], "found": found}
            self.report.outliers.append({"case": self.report.case(variant, cell), **own})

        def without(values: list[float | None]) -> list[float | None]:
            return [None if i in left_out else value for i, value in enumerate(values)]

        return Samples(without(samples.seconds), without(samples.ttft))


def workload(options: argparse.Namespace, requests_of_rank: int) -> Workload:
    return Workload(requests_of_rank, options.ranks, options.prompt_tokens, options.output_tokens)


def launch_of(options: argparse.Namespace, client: dict[str, str]) -> Launch:
    most = max(options.requests)
    return Launch(
        device=options.device,
        ranks=options.ranks,
        layers=options.layers,
        dtype=options.dtype,
        tokens=most * (options.prompt_tokens + options.output_tokens),  # a rank prefills all of them in one pass
        requests=most * options.ranks,
        routings=servers.routings(options.layers, [1.0])[1:],
        attention=options.attention,
        deepep_mode="auto",
        decode_graphs=most,
        share_gpu=options.share_gpu,
        client=client,
        cache=options.cache,
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_options.parser_of(__doc__, 48)
    common_options.add_variants(parser, 2, "beside stock: auto, fused, inf; all")
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS, help="of a rank, in the order measured")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    options = common_options.parse(parser, argv)
    if options.output_tokens < SETTLE + 3:
        parser.error(f"--output-tokens {options.output_tokens}: at least {SETTLE + 3}, of which {SETTLE} settle")
    return options


def measure_group(group: list[Variant], launch: Launch, model: Path, report: Report, until: float) -> None:
    """All sizes of a group, in time shares that are equal for those left."""
    with groups.running(report.program, group, launch, model, report.options.stagger) as clients:
        measuring, cells = Group(group, clients, launch, report), [Cell(n) for n in report.options.requests]
        for cell, its_end in groups.in_shares(report.program, cells, until):
            measuring.measure(cell, its_end, until)


def groups_of(options: argparse.Namespace) -> list[list[Variant]]:
    """What runs side by side."""
    return servers.grouped(chosen_variants(options.variants, options.device), options.at_once)


def main() -> int:
    options = parse()
    return groups.run(Report(options), groups_of(options), launch_of, measure_group)


if __name__ == "__main__":
    sys.exit(main())

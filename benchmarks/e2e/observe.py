"""What --macs-preset observe costs in prefill, end to end, and whether it sees the loads that the proof counts.

    python3 -m benchmarks.e2e.observe --out docs/results/observe_h200.json --share-gpu --layers 12 --minutes 3

One server of prefill.py's model and routing, whose options change while it serves: rounds of the same passes, in turn
under every one of MODES. So both sides of a pair are the same processes, graphs and memory. `off` recounts nothing;
under `observe` one pass of a round is looked at, more often than users have it; under `every` each pass is. What that
adds, divided by the passes of --macs-verify-every, is the cost, and is known far better than the rounds of `observe`
show it. A ratio is the median over the turns, time of a mode over that of `off`. Then one round under `proof`, which
recounts each pass in it, and one under `every`: by layer, the most loaded rank over the mean as either has it. FILE is
written after every size.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks.check_serving import interval
from benchmarks.e2e import common_options, groups, servers, summary
from benchmarks.e2e.rounds import ROUND_SECONDS, WARM_UP_SECONDS, Client, Run, Workload
from benchmarks.e2e.servers import BOUNDED, COUNTED, Launch, Variant
from benchmarks.serving import ServerError
from sglang_macs.observe.verdict import verdict

PASSES = 16  # of a round: one of them is observed, wherever it begins
SETTLE = 4  # passes behind a change that are not counted: layers are launched, captured, and then graphs
MODES = {
    "off": {"preset": "off", "verify": "false", "verify_every": 0},
    "observe": {"preset": "observe", "verify": "false", "verify_every": PASSES},
    "every": {"preset": "observe", "verify": "false", "verify_every": 1},
    "proof": {"preset": "off", "verify": "true"},
}
TIMED = ("off", "observe", "every")
TOKENS = [8192, 2048]  # a rank and pass: where GPUs are busy, and where the host is behind
ARRIVAL_SECONDS = 20  # that the last observed passes may take to be counted


class Measured:
    """One server and the result file."""

    def __init__(self, options: argparse.Namespace, client: Client) -> None:
        self.options, self.client, self.rows = options, client, []

    def case(self, tokens: int) -> dict:
        names = ("layers", "dtype", "ranks")
        return {"tokens": tokens, "skew": self.options.skew} | {name: getattr(self.options, name) for name in names}

    def workload(self, tokens: int, passes: int) -> Workload:
        return Workload.of(tokens, self.options.prompt_tokens, self.options.ranks, pictures=False, passes=passes)

    def size(self, tokens: int, until: float) -> None:
        """The rows of one size: times until the clock says `until`, then loads."""
        self.client.choose(1, tokens)
        work = self.workload(tokens, PASSES)
        runs: dict[str, list[Run]] = {mode: [] for mode in TIMED}
        for turn in range(-self.options.warm_ups, self.options.rounds):
            if turn > 0 and time.monotonic() > until:
                break
            for mode in TIMED if turn % 2 == 0 else TIMED[::-1]:
                run = self.round(mode, work)
                if turn >= 0:
                    runs[mode].append(run)
        samples = {mode: summary.Samples([run.seconds for run in of_mode]) for mode, of_mode in runs.items()}
        for mode in TIMED[1:]:
            self.rows.append(self.cost(mode, work, samples[mode], samples["off"], runs[mode]))
        self.rows.append(self.loads(work))
        self.write()

    def round(self, mode: str, work: Workload) -> Run:
        """One round, once the mode's graphs are there."""
        self.client.change(MODES[mode])
        self.client.run(self.workload(work.tokens, SETTLE).body())
        return self.client.run(work.body(), WARM_UP_SECONDS)

    def cost(self, mode: str, work: Workload, own: summary.Samples, off: summary.Samples, runs: list[Run]) -> dict:
        found = interval(summary.ratios(own.seconds, off.seconds))
        row = {
            "op": "e2e_observe",
            "case": self.case(work.tokens) | {"mode": mode},
            "against": "off",
            "ratio": found.median,
            "ci95": summary.bounds(found),
            "rounds": found.pairs,
            "pass_ms": 1e3 * own.median_seconds() / work.passes,
            "off_pass_ms": 1e3 * off.median_seconds() / work.passes,
            "full": sum(run.full(work) for run in runs),
        }
        print(f"observe: {work.tokens} tokens, {mode}: {found}", flush=True)
        return row

    def loads(self, work: Workload) -> dict:
        """Most loaded rank over mean of each layer, over the same passes."""
        seen = {mode: self.seen(mode, work) for mode in ("proof", "every")}
        by_layer = {layer: {mode: seen[mode][layer] for mode in seen} for layer in seen["proof"]}
        furthest = max(abs(one["every"] - one["proof"]) for one in by_layer.values())
        print(f"observe: {work.tokens} tokens: max/mean of {len(by_layer)} layers, at most {furthest:.2g} apart")
        line = verdict(self.client.states())
        return {
            "op": "observed_loads",
            "case": self.case(work.tokens),
            "passes": work.passes,
            "furthest": furthest,
            "max_over_mean": by_layer,
            "verdict": line,
        }

    def seen(self, mode: str, work: Workload) -> dict[str, float]:
        """By layer, over one round. Raises ServerError where not every pass has been counted."""
        self.client.change(MODES[mode])
        self.client.run(self.workload(work.tokens, SETTLE).body())
        before = self.counted(0)
        self.client.run(work.body(), ROUND_SECONDS)
        after = self.counted(before["passes"] + work.passes)
        means = {}
        for layer, sums in after["layers"].items():
            then = before["layers"].get(layer, {"dispatches": 0, "max_over_mean_before": 0.0})
            dispatches = sums["dispatches"] - then["dispatches"]
            if dispatches != work.passes:
                raise ServerError(f"layer {layer}: {dispatches} of {work.passes} passes are counted under {mode}")
            means[layer] = (sums["max_over_mean_before"] - then["max_over_mean_before"]) / dispatches
        return means

    def counted(self, passes: int) -> dict:
        """The group's counters once they have settled, and at least so many passes are in them."""
        until, last = time.monotonic() + ARRIVAL_SECONDS, -1
        while True:
            layers = min(self.client.states(), key=lambda state: state["rank"])["layers"]  # each rank has the group's
            found = min((layer["dispatches"] for layer in layers.values()), default=0)
            if (found == last and found >= passes) or time.monotonic() > until:
                return {"layers": layers, "passes": found}
            last = found
            time.sleep(0.5)

    def write(self) -> None:
        common_options.write(self.options.out, common_options.header(self.options) | {"rows": self.rows})


def variant_of(options: argparse.Namespace) -> Variant:
    flags = COUNTED if options.device == "cpu" or options.dispatch == "deepep" else BOUNDED
    return Variant("observe", options.dispatch, (*flags, "--macs-preset", "observe"))


def launch_of(options: argparse.Namespace, client: dict[str, str]) -> Launch:
    prompts = [Workload.of(n, options.prompt_tokens, options.ranks, False, PASSES).prompts for n in options.tokens]
    return Launch(
        device=options.device,
        ranks=options.ranks,
        layers=options.layers,
        dtype=options.dtype,
        tokens=max(options.tokens),
        requests=max(prompts),
        routings=servers.routings(options.layers, [options.skew]),
        attention=options.attention,
        share_gpu=options.share_gpu,
        client=client,
        cache=options.cache,
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_options.parser_of(__doc__, 24)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of a rank's pass, in the order measured")
    parser.add_argument("--skew", type=float, default=1.27, help="maximum over mean of the ranks, mean of the layers")
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="tokens of a prompt, at most")
    parser.add_argument("--dispatch", choices=("bounded", "deepep"), default="bounded")
    return common_options.parse(parser, argv)


def measure(options: argparse.Namespace, client: dict[str, str]) -> list[dict]:
    """The rows. client: environment of the server, where ranks share a GPU."""
    end = time.monotonic() + 60 * options.minutes
    variant, launch = variant_of(options), launch_of(options, client)
    model = servers.build_model(options.layers, options.dtype, real=options.device == "cuda")
    with groups.running("observe", [variant], launch, model, 0.0) as clients:
        measured = Measured(options, clients[variant.flags])
        for tokens, until in groups.in_shares("observe", options.tokens, end):
            measured.size(tokens, until)
    return measured.rows


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ended from outside, servers end, too
    with groups.sharing(options, [[variant_of(options)]]) as client:
        rows = measure(options, client)
    print(f"observe: {len(rows)} rows in {Path(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

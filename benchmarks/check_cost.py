"""What MACS costs the requests of a real server (CPU, two ranks) where it has nothing to clip.

    python -m benchmarks.check_cost plan [--model wide|tiny] [--seconds 240] [--most 0.01] [--out FILE.json]
    python -m benchmarks.check_cost installed ...

`plan`: one server at infinite gamma. Whether it plans a request or leaves it alone, as with preset off, is switched
from request to request, so that both sides share one process, its memory and its threads. `installed`: two servers of
stock SGLang, one with the plugin installed and one without; the one that is not asked is stopped (SIGSTOP).

Requests go one at a time, in blocks of A B B A, each with a picture of its own; a block yields one ratio of latencies
and one of CPU times (which other work on the machine does not stretch, and waiting does not show in). Reported are the
medians with 95 % confidence intervals that assume no distribution. With --most, exit 0 if both intervals lie below
1 + most, otherwise 1 or 2: it costs more, or it cannot be said.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import requests

from benchmarks.bench_plan import commit
from benchmarks.check_serving import KINDS, OUT, Interval, ask, crops, interval, verdict
from benchmarks.serving import EP2_ARGS, Server, ServerError, states
from sglang_macs import cpu_compat, tiny_models

ROOT = Path(__file__).resolve().parent.parent
PROBE_SITE = Path(__file__).resolve().parent / "probe_site"
# Layers as wide as those of Qwen3-VL-30B-A3B (hidden 2048, experts of 768, top-8), but 3 of 48 and a quarter of the
# experts: a token's work in a layer does not depend on how many experts there are.
WIDE = {"hidden": 2048, "intermediate": 768, "top_k": 8, "num_experts": 32}
MODELS: dict[str, dict[str, int]] = {"tiny": {}, "wide": WIDE}
MOST_BLOCKS = 400
ORDER = (0, 1, 1, 0)  # both sides meet both data-parallel ranks, which take turns, and drift cancels


class Probe:
    """The plugin of benchmarks/probe_site in a server: its switch, and what it measured. `folder` is emptied first."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self.plans(True)

    def plans(self, on: bool) -> None:
        """Whether the server plans from now on. Only between requests: all ranks must see the same."""
        if on:
            (self.folder / "switch").touch()
        else:
            (self.folder / "switch").unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """Of a server that loads it."""
        base = {"PYTHONPATH": os.pathsep.join([str(PROBE_SITE), os.environ.get("PYTHONPATH", "")])}
        return {"PYTHONPATH": cpu_compat.environment(2, base)["PYTHONPATH"], "MACS_PROBE": str(self.folder)}

    def spent(self) -> list[dict]:
        """Of each rank, by side: `cpu_seconds` in forward passes, `layer_cpu_seconds` of these where layers decide what
        they dispatch, and `layer_ms`, the wall time of each such decision over tokens of its own.
        """
        time.sleep(0.02)  # the other rank ends its pass of the last request
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("spent-*.json"))]


# ---- The two comparisons -------------------------------------------------------------------------------------------


class PlannedOrNot:
    """One server at infinite gamma, whose plans a probe switches on and off."""

    sides = ("left alone", "planned")

    def __init__(self, model: Path) -> None:
        self.probe = Probe(OUT / "probe")
        args = [*EP2_ARGS, "--moe-a2a-backend", "macs", "--macs-preset", "rank", "--macs-gamma", "inf"]
        self.server = Server(model, args, env=self.probe.environment(), log=OUT / "cost-plan.log")

    def __enter__(self) -> "PlannedOrNot":
        self.server.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self.server.stop()

    def ask(self, side: int, uri: str, number: int) -> float:
        """Seconds of one request."""
        self.probe.plans(side == 1)
        return ask(self.server.url, str(self.server.model), uri, number)

    def cpu_seconds(self) -> list[float]:
        """By side, in forward passes of both ranks, so far."""
        return self._over_ranks("cpu_seconds")

    def _over_ranks(self, name: str) -> list[float]:
        return [sum(rank) for rank in zip(*(found[name] for found in self.probe.spent()), strict=True)]

    def figures(self) -> dict:
        """layer_ms: how long a layer takes to decide what it dispatches. plan_share: the CPU time of that, planned less
        left alone, over that of forward passes left alone. Raises ServerError if nothing was compared.
        """
        for state in states(self.server):
            planned, left = state["planned"], state["skipped"].get("off", 0)
            clipped = state["own"]["clipped_visual"] + state["own"]["clipped_text"]
            if not planned or abs(planned - left) > 0.1 * planned or clipped:
                raise ServerError(f"compared nothing: {planned} plans, {left} left alone, {clipped} clipped")
        left, planned = ([ms for rank in self.probe.spent() for ms in rank["layer_ms"][side]] for side in (0, 1))
        (cpu_left, cpu_planned), (passes_left, _) = self._over_ranks("layer_cpu_seconds"), self.cpu_seconds()
        return {
            "layer_ms": {"left alone": statistics.median(left), "planned": statistics.median(planned)},
            "plan_share": (cpu_planned - cpu_left) / passes_left,
        }


class InstalledOrNot:
    """Two servers of stock SGLang; the one that is not asked is stopped."""

    sides = ("absent", "installed")

    def __init__(self, model: Path) -> None:
        self.servers = []
        for kind in self.sides:
            args, env = KINDS[kind]
            self.servers.append(Server(model, args, env=env, log=OUT / f"cost-{kind}.log"))

    def __enter__(self) -> "InstalledOrNot":
        for server in self.servers:
            server.__enter__()
            server.pause()
        return self

    def __exit__(self, *_) -> None:
        for server in self.servers:
            server.stop()

    def ask(self, side: int, uri: str, number: int) -> float:
        """Seconds of one request."""
        server = self.servers[side]
        server.resume()
        try:
            return ask(server.url, str(server.model), uri, number)
        finally:
            server.pause()

    def cpu_seconds(self) -> list[float]:
        """By side, of all the server's processes, so far."""
        return [server.cpu_seconds() for server in self.servers]

    def figures(self) -> dict:
        return {}


COMPARISONS = {"plan": PlannedOrNot, "installed": InstalledOrNot}


# ---- Measurement ---------------------------------------------------------------------------------------------------


def measure(compared: PlannedOrNot | InstalledOrNot, seconds: float) -> dict[str, list[list[float]]]:
    """{"latency": [first, second], "cpu": [first, second]} seconds, one entry a block; the first block warms up."""
    uris = iter(crops(len(ORDER) * (MOST_BLOCKS + 1)))
    spent: dict[str, list[list[float]]] = {"latency": [[], []], "cpu": [[], []]}
    end = time.monotonic() + seconds
    for block in range(-1, MOST_BLOCKS):
        if time.monotonic() > end:
            break
        took, cpu = [0.0, 0.0], compared.cpu_seconds() if block >= 0 else [0.0, 0.0]
        for i, side in enumerate(ORDER):
            took[side] += compared.ask(side, next(uris), len(ORDER) * block + i)
        if block < 0:
            continue
        for side, total in enumerate(compared.cpu_seconds()):
            spent["cpu"][side].append(total - cpu[side])
            spent["latency"][side].append(took[side])
    return spent


def row(options: argparse.Namespace, compared: PlannedOrNot | InstalledOrNot, spent: dict) -> dict:
    """One row of a result file."""
    case = {"comparison": options.comparison, "model": options.model, **MODELS[options.model]}
    new = {"op": "e2e", "case": case, "against": compared.sides[0], "ratio": None, "blocks": len(spent["cpu"][0])}
    new["load_average"] = os.getloadavg()[1]  # over the last five minutes
    for name, sides in spent.items():
        found = interval([second / first for first, second in zip(*sides, strict=True)])
        new[name] = {"ratio": found.median, "ci95": [found.low, found.high]}
        new[name]["seconds_a_request"] = [2 * statistics.median(side) / len(ORDER) for side in sides]
    new["ratio"] = new["latency"]["ratio"]
    return new | compared.figures()


def save(path: Path, new: dict) -> None:
    """Adds the row to a result file, in the place of an older one of the same case and commit."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    ran = {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}

    def measured(row: dict, of: str) -> tuple[str, str, str]:
        return row["case"]["comparison"], row["case"]["model"], of

    rows = [old for old in rows if measured(old, old["commit"]) != measured(new, ran["commit"])]
    head = {"gpu": "none", "cpu": f"{os.uname().machine}, {os.cpu_count()} threads", **ran}
    head |= {"command": "python -m benchmarks.check_cost"}
    path.write_text(json.dumps({**head, "rows": [*rows, {**new, **ran}]}, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=list(COMPARISONS))
    parser.add_argument("--model", choices=list(MODELS), default="wide")
    parser.add_argument("--seconds", type=float, default=240.0, help="how long to ask")
    parser.add_argument("--most", type=float, help="share by which the second may be slower, e.g. 0.01")
    parser.add_argument("--out", type=Path, help="result file to add the figures to")
    options = parser.parse_args(argv)
    model = ROOT / "build" / "models" / f"{options.model}-qwen3-vl-moe"
    try:
        tiny_models.ensure(model, "qwen3_vl_moe", **MODELS[options.model])
        with COMPARISONS[options.comparison](model) as compared:
            new = row(options, compared, measure(compared, options.seconds))
    except (ServerError, requests.RequestException) as error:
        print(f"check_cost: {error}", file=sys.stderr)
        return 2
    print(json.dumps(new, indent=1))
    if options.out:
        save(options.out, new)
    found = [Interval(new[name]["ratio"], *new[name]["ci95"], new["blocks"]) for name in ("latency", "cpu")]
    return 0 if options.most is None else max(verdict(each, options.most) for each in found)


if __name__ == "__main__":
    sys.exit(main())

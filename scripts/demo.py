"""The demo: a real SGLang server, two expert-parallel ranks on this machine, image chats without and with MACS.

Starts the server three times (off, paper, rank), sends the same chats, and shows the load of each rank before and
after. Writes build/demo/summary.json and build/demo/load.png. Exit 0 only if MACS was provably active on both ranks,
every request succeeded and every bound held.
"""

import argparse
import io
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from serving import EP2_ARGS, Server, ServerError, data_uri, photograph_files
from tqdm import tqdm

from sglang_macs import tiny_models

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "demo"
MODEL = ROOT / "build" / "models" / "tiny-qwen3-vl-moe"
QUESTIONS = ("What is in this picture?", "Which colours stand out?", "Describe the background in one sentence.")
RANKS = 2


@dataclass(frozen=True)
class Run:
    """One server's figures. Rows are the EP group's, summed over the planned dispatches of all layers."""

    preset: str
    active_ranks: int
    requests_ok: int
    requests: int
    rows_before: list[int]
    rows_after: list[int]
    max_over_mean_before: float
    max_over_mean_after: float
    assignments: dict[str, int]
    clipped: dict[str, int]
    rerouted: dict[str, int]
    dropped: dict[str, int]
    checks: int
    violations: int
    latency_ms_median: float
    latency_ms_p95: float
    layers: dict[str, dict]

    @property
    def proved(self) -> bool:
        """Active on both ranks, all answered, and every check of a bound held (the `off` run has nothing to check)."""
        answered = self.active_ranks == RANKS and self.requests_ok == self.requests
        return answered and self.violations == 0 and (self.preset == "off" or self.checks > 0)


def pictures(image: str | None, count: int) -> list[str]:
    """`count` different crops of real photographs as data URIs, so that no request finds another's prefix in the
    cache.
    """
    files = [image] if image else [io.BytesIO(content) for content in photograph_files().values()]
    sources = [Image.open(file).convert("RGB") for file in files]
    uris = []
    for i in range(count):
        source = sources[i % len(sources)]
        side = int(min(source.size) * (0.5 + 0.4 * (i % 5) / 4))
        left, top = (i * 37) % (source.width - side + 1), (i * 23) % (source.height - side + 1)
        buffer = io.BytesIO()
        source.crop((left, top, left + side, top + side)).save(buffer, "JPEG", quality=90)
        uris.append(data_uri(buffer.getvalue()))
    return uris


def chat(server: Server, uri: str, question: str) -> float:
    """Milliseconds of one image chat."""
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
    start = time.perf_counter()
    server.chat([{"role": "user", "content": content}], max_tokens=8)
    return (time.perf_counter() - start) * 1e3


def send(server: Server, uris: list[str], label: str) -> list[float]:
    """Latencies of the chats that were answered, eight at a time."""

    def one(i: int) -> float | None:
        try:
            return chat(server, uris[i], QUESTIONS[i % len(QUESTIONS)])
        except ServerError as error:
            print(f"request {i} failed: {str(error).splitlines()[0]}", file=sys.stderr)
            return None

    with ThreadPoolExecutor(8) as pool:
        done = list(tqdm(pool.map(one, range(len(uris))), total=len(uris), desc=f"  {label}: chats", unit="chat"))
    return [latency for latency in done if latency is not None]


def by_modality(states: list[dict], kind: str) -> dict[str, int]:
    """A counter of each rank's own assignments, added up over the ranks."""
    return {m: sum(s["own"].get(f"{kind}_{m}", 0) for s in states) for m in ("visual", "text")}


def figures(preset: str, states: list[dict], latencies: list[float], requests: int) -> Run:
    """One run from the servers' own counters."""
    layers = states[0]["layers"]
    dispatches = sum(layer["dispatches"] for layer in layers.values())

    def total(name: str) -> list[int]:
        return [sum(layer[name][r] for layer in layers.values()) for r in range(RANKS)]

    def mean(name: str) -> float:
        return sum(layer[name] for layer in layers.values()) / max(dispatches, 1)

    return Run(
        preset=preset,
        active_ranks=len({s["rank"] for s in states if s["dispatches"] and (preset == "off" or s["planned"])}),
        requests_ok=len(latencies),
        requests=requests,
        rows_before=total("rows_before"),
        rows_after=total("rows_after"),
        max_over_mean_before=mean("max_over_mean_before"),
        max_over_mean_after=mean("max_over_mean_after"),
        assignments=by_modality(states, "assignments"),
        clipped=by_modality(states, "clipped"),
        rerouted=by_modality(states, "rerouted"),
        dropped=by_modality(states, "dropped"),
        checks=sum(sum(s["checks"].values()) for s in states),
        violations=sum(sum(s["violations"].values()) for s in states),
        latency_ms_median=statistics.median(latencies) if latencies else 0.0,
        latency_ms_p95=sorted(latencies)[int(0.95 * (len(latencies) - 1))] if latencies else 0.0,
        layers=layers,
    )


def serve(preset: str, gamma: float, uris: list[str]) -> Run:
    """Starts the real server with one preset, asks, and reads its counters."""
    args = [*EP2_ARGS, "--moe-a2a-backend", "macs", "--macs-preset", preset, "--macs-verify", "true"]
    if preset != "off":
        args += ["--macs-gamma", str(gamma)]
    with Server(MODEL, args, log=OUT / f"server-{preset}.log") as server:
        chat(server, uris[0], "Warm up.")
        latencies = send(server, uris, preset)
        states = [state["macs"] for state in server.get("/server_info")["internal_states"]]
    return figures(preset, states, latencies, len(uris))


def table(runs: list[Run]) -> str:
    """What a person wants to compare, one column a run."""

    def pair(counts: dict[str, int]) -> str:
        return f"{counts['visual']} / {counts['text']}"

    rows = [
        ("", [r.preset for r in runs]),
        ("rows per rank, before", [" ".join(map(str, r.rows_before)) for r in runs]),
        ("rows per rank, after", [" ".join(map(str, r.rows_after)) for r in runs]),
        ("max/mean of a dispatch, before", [f"{r.max_over_mean_before:.3f}" for r in runs]),
        ("max/mean of a dispatch, after", [f"{r.max_over_mean_after:.3f}" for r in runs]),
        ("clipped (visual / text)", [pair(r.clipped) for r in runs]),
        ("re-routed (visual / text)", [pair(r.rerouted) for r in runs]),
        ("dropped (visual / text)", [pair(r.dropped) for r in runs]),
        ("bounds checked / violated", [f"{r.checks} / {r.violations}" for r in runs]),
        ("requests ok", [f"{r.requests_ok} / {r.requests}" for r in runs]),
        ("latency median / p95, ms", [f"{r.latency_ms_median:.0f} / {r.latency_ms_p95:.0f}" for r in runs]),
    ]
    return "\n".join(f"{name:<32}" + "".join(f"{cell:>20}" for cell in cells) for name, cells in rows)


def draw(runs: list[Run], gamma: float, path: Path) -> None:
    """Rows of each rank, layer by layer: outlines before, filled after, and the mean that the slowest rank is held
    to.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3.8), sharey=True, constrained_layout=True)
    for axis, run in zip(axes, runs, strict=True):
        for i, (_, counts) in enumerate(sorted(run.layers.items(), key=lambda item: int(item[0]))):
            mean = sum(counts["rows_before"]) / RANKS
            for rank in range(RANKS):
                x, color = i + (rank - 0.5) * 0.38, f"C{rank}"
                label = f"rank {rank}" if i == 0 else None
                axis.bar(x, counts["rows_after"][rank] / mean, 0.34, color=color, alpha=0.85, label=label)
                before = counts["rows_before"][rank] / mean
                axis.bar(x, before, 0.34, fill=False, edgecolor="black", linewidth=1.1, linestyle="--")
        if run.preset == "rank":  # the paper's preset bounds each expert's weighted load, not the ranks
            axis.axhline(gamma, color="crimson", linewidth=1.2, label=f"bound: gamma {gamma:g}")
        axis.set_title(f"{run.preset}: max/mean {run.max_over_mean_before:.2f} → {run.max_over_mean_after:.2f}")
        axis.set_xticks(range(len(run.layers)), [f"layer {i}" for i in range(len(run.layers))])
    axes[0].set_ylabel("rows of a rank / mean of the ranks")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=RANKS + 1, frameon=False)
    figure.suptitle("Expert-parallel load on two ranks: dashed = routed, filled = dispatched")
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", help="your own picture instead of scikit-learn's two photographs")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--gamma", type=float, default=1.0)
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    tiny_models.ensure(MODEL, "qwen3_vl_moe")
    try:
        uris = pictures(options.image, options.requests)
    except OSError as error:
        parser.error(f"--image: got {options.image} ({error}), expected a picture file")
    try:
        runs = [serve(preset, options.gamma, uris) for preset in ("off", "paper", "rank")]
    except ServerError as error:
        print(f"{error}\ndemo FAILED: a server did not start or did not answer; above, the end of its log.")
        return 1
    draw(runs, options.gamma, OUT / "load.png")
    (OUT / "summary.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    ok = all(run.proved for run in runs)
    print(f"\n{table(runs)}\n\nThe weights are random: the answers mean nothing, the load does.")
    print(f"Picture: {(OUT / 'load.png').relative_to(ROOT)}   figures: {(OUT / 'summary.json').relative_to(ROOT)}")
    verdict = "OK: MACS was active on both ranks and every bound held" if ok else "FAILED: see the table and the logs"
    print(f"demo {verdict} ({time.perf_counter() - start:.0f} s).")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

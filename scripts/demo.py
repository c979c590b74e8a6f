"""The demo: a real SGLang server, two expert-parallel ranks on this machine, image chats without and with MACS.

Starts the server three times (off, paper, rank), sends the same chats, and shows the load of each rank before and
after, and how many answers are right. Writes build/demo/summary.json and build/demo/load.png. Exit 0 only if MACS was
provably active on both ranks, every request succeeded, every bound held, and the answers are right.

The model is the lab's (models/lab-vl-moe): it reads, compares and finds digits in pictures that it has never seen.
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
from tqdm import tqdm

from benchmarks.serving import EP2_ARGS, Server, ServerError, data_uri, states
from lab.lab_questions import Question, questions
from sglang_macs.plan.batch import NO_GAIN

ROOT = Path(__file__).resolve().parent.parent

OUT = ROOT / "build" / "demo"
MODEL = ROOT / "models" / "lab-vl-moe"
# Parts of a whole of the requests, by picture size and task: see lab/lab_tasks.py.
MIX = {
    "wide": {"read": 10, "compare": 4},
    "square": {"read": 4, "colour": 3, "where": 3},
    "large": {"scene": 4, "read": 4},
}
OWN_PICTURE = ("Describe the digits.", "Read the digits.", "What is behind the digits?")
RANKS = 2
PRESETS = {
    "off": "SGLang alone; loads are counted",
    "paper": "bounds the entropy-weighted load of each expert, re-routes within the rank (the ranks stay as they are)",
    "rank": "bounds the rows of each rank, re-routes to any rank",
}
RIGHT = 0.85  # of the answers without clipping; and clipping may not cost more than MAY_LOSE
MAY_LOSE = 0.1


@dataclass(frozen=True)
class Run:
    """One server's figures. Rows are the EP group's, summed over the planned dispatches of all layers."""

    preset: str
    active_ranks: int
    requests_ok: int
    requests: int
    answers_right: int | None
    rows_before: list[int]
    rows_after: list[int]
    max_over_mean_before: float
    max_over_mean_after: float
    assignments: dict[str, int]
    clipped: dict[str, int]
    rerouted: dict[str, int]
    dropped: dict[str, int]
    planned: int  # dispatches of all ranks
    no_gain: int  # and those left alone, since a plan would have gained too little
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


def asked(image: str | None, count: int) -> list[Question]:
    """`count` questions whose answers are known; or about crops of your own picture, whose answers nobody checks."""
    if image is None:
        made = questions({size: dict(tasks) for size, tasks in MIX.items()}, seed=1)
        return [made[i % len(made)] for i in range(count)]
    source = Image.open(image).convert("RGB")
    found = []
    for i in range(count):
        side = int(min(source.size) * (0.5 + 0.4 * (i % 5) / 4))
        left, top = (i * 37) % (source.width - side + 1), (i * 23) % (source.height - side + 1)
        buffer = io.BytesIO()
        source.crop((left, top, left + side, top + side)).resize((256, 256)).save(buffer, "PNG")
        found.append(Question("own", OWN_PICTURE[i % len(OWN_PICTURE)], (buffer.getvalue(),), ""))
    return found


def chat(server: Server, question: Question) -> tuple[float, str]:
    """Milliseconds and answer of one image chat."""
    urls = [data_uri(picture, "image/png") for picture in question.pictures]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": question.text})
    start = time.perf_counter()
    answer = server.chat([{"role": "user", "content": content}], max_tokens=14)
    return (time.perf_counter() - start) * 1e3, answer["choices"][0]["message"]["content"].strip()


def send(server: Server, chats: list[Question], label: str) -> list[tuple[float, bool]]:
    """Latency, and whether the answer is right, of the chats that were answered, eight at a time."""

    def one(question: Question) -> tuple[float, bool] | None:
        try:
            latency, answer = chat(server, question)
            return latency, answer == question.answer
        except ServerError as error:
            print(f"{question.text} failed: {str(error).splitlines()[0]}", file=sys.stderr)
            return None

    with ThreadPoolExecutor(8) as pool:
        done = list(tqdm(pool.map(one, chats), total=len(chats), desc=f"  {label}: chats", unit="chat"))
    return [answered for answered in done if answered is not None]


def by_modality(states: list[dict], kind: str) -> dict[str, int]:
    """A counter of each rank's own assignments, added up over the ranks."""
    return {m: sum(s["own"].get(f"{kind}_{m}", 0) for s in states) for m in ("visual", "text")}


def figures(preset: str, states: list[dict], answered: list[tuple[float, bool]], chats: list[Question]) -> Run:
    """One run from the servers' own counters."""
    latencies, checked = [ms for ms, _ in answered], any(q.answer for q in chats)
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
        requests=len(chats),
        answers_right=sum(right for _, right in answered) if checked else None,
        rows_before=total("rows_before"),
        rows_after=total("rows_after"),
        max_over_mean_before=mean("max_over_mean_before"),
        max_over_mean_after=mean("max_over_mean_after"),
        assignments=by_modality(states, "assignments"),
        clipped=by_modality(states, "clipped"),
        rerouted=by_modality(states, "rerouted"),
        dropped=by_modality(states, "dropped"),
        planned=sum(s["planned"] for s in states),
        no_gain=sum(s["skipped"].get(NO_GAIN, 0) for s in states),
        checks=sum(sum(s["checks"].values()) for s in states),
        violations=sum(sum(s["violations"].values()) for s in states),
        latency_ms_median=statistics.median(latencies) if latencies else 0.0,
        latency_ms_p95=sorted(latencies)[int(0.95 * (len(latencies) - 1))] if latencies else 0.0,
        layers=layers,
    )


def serve(preset: str, gamma: float, chats: list[Question]) -> Run:
    """Starts the real server with one preset, asks, and reads its counters."""
    args = [*EP2_ARGS, "--moe-a2a-backend", "macs", "--macs-preset", preset, "--macs-verify", "true"]
    if preset != "off":
        args += ["--macs-gamma", str(gamma)]
    with Server(MODEL, args, log=OUT / f"server-{preset}.log") as server:
        _, answer = chat(server, chats[0])
        print(f'  {preset}: "{chats[0].text}" is answered "{answer}"', flush=True)
        server.flush_cache()
        answered = send(server, chats, preset)
        counters = states(server)
    return figures(preset, counters, answered, chats)


def answers_hold(runs: list[Run]) -> bool:
    """Whether the model is right without MACS, and nearly as often with it; True where nobody knows the answers."""
    if any(run.answers_right is None for run in runs):
        return True
    off, *clipped = (run.answers_right / run.requests for run in runs)
    return off >= RIGHT and all(share >= off - MAY_LOSE for share in clipped)


def table(runs: list[Run]) -> str:
    """What a person wants to compare, one column a run."""

    def pair(counts: dict[str, int]) -> str:
        return f"{counts['visual']} / {counts['text']}"

    def shown(right: int | None) -> str:
        return "not checked" if right is None else str(right)

    rows = [
        ("", [r.preset for r in runs]),
        ("rows per rank, before", [" ".join(map(str, r.rows_before)) for r in runs]),
        ("rows per rank, after", [" ".join(map(str, r.rows_after)) for r in runs]),
        ("max/mean of a dispatch, before", [f"{r.max_over_mean_before:.3f}" for r in runs]),
        ("max/mean of a dispatch, after", [f"{r.max_over_mean_after:.3f}" for r in runs]),
        ("clipped (visual / text)", [pair(r.clipped) for r in runs]),
        ("re-routed (visual / text)", [pair(r.rerouted) for r in runs]),
        ("dropped (visual / text)", [pair(r.dropped) for r in runs]),
        ("planned / left alone for no gain", [f"{r.planned} / {r.no_gain}" for r in runs]),
        ("bounds checked / violated", [f"{r.checks} / {r.violations}" for r in runs]),
        ("answers right", [shown(r.answers_right) for r in runs]),
        ("requests ok", [f"{r.requests_ok} / {r.requests}" for r in runs]),
        ("latency median / p95, ms", [f"{r.latency_ms_median:.0f} / {r.latency_ms_p95:.0f}" for r in runs]),
    ]
    return "\n".join(f"{name:<34}" + "".join(f"{cell:>20}" for cell in cells) for name, cells in rows)


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
    parser.add_argument("--image", help="your own picture; its answers are not checked")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--gamma", type=float, default=1.0)
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    print(f"One server after the other, {RANKS} expert-parallel ranks on this machine, {options.requests} image chats:")
    print("\n".join(f"  {preset:<6} {what}" for preset, what in PRESETS.items()), flush=True)
    try:
        chats = asked(options.image, options.requests)
    except OSError as error:
        parser.error(f"--image: got {options.image} ({error}), expected a picture file")
    try:
        runs = [serve(preset, options.gamma, chats) for preset in PRESETS]
    except ServerError as error:
        print(f"{error}\ndemo FAILED: a server did not start or did not answer; above, the end of its log.")
        return 1
    draw(runs, options.gamma, OUT / "load.png")
    (OUT / "summary.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    ok = all(run.proved for run in runs) and answers_hold(runs)
    print(f"\n{table(runs)}\n")
    print(
        "Rows are assignments of tokens to a rank's experts. A rank waits for the fullest one: max/mean is what counts."
    )
    print("Latencies are those of two ranks sharing this machine; they say nothing about GPUs.")
    print(f"Picture: {(OUT / 'load.png').relative_to(ROOT)}   figures: {(OUT / 'summary.json').relative_to(ROOT)}")
    verdict = "OK: MACS was active on both ranks and every bound held" if ok else "FAILED: see the table and the logs"
    print(f"demo {verdict} ({time.perf_counter() - start:.0f} s).")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

"""Two servers against each other: what MACS costs, or buys, in the requests of a running server.

    python -m benchmarks.check_serving --compare off inf            tiny model, CPU, both servers on this machine
    python -m benchmarks.check_serving --urls URL URL --model M      two servers that run already
    python -m benchmarks.check_serving ... --measure bench           SGLang's own bench_serving, image workload

`requests` sends the same image chat to both servers, one after the other, and looks at the ratio of the two latencies;
`bench` runs `sglang.bench_serving` on them in turn (A B B A ...) and looks at TTFT, ITL and throughput. Both report the
median ratio of second to first with a 95 % confidence interval that assumes no distribution. With --most, exit 0 if the
interval lies below 1 + most, 1 if it lies above, 2 if it cannot be said.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
from PIL import Image
from scipy import stats

from benchmarks.serving import CPU_ARGS, EP2_ARGS, Server, ServerError, data_uri, photograph_files
from sglang_macs import cpu_compat, tiny_models

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "serving"
BENCH_SITE = Path(__file__).resolve().parent / "bench_site"
FORKS = Path(__file__).resolve().parent / "bench_forks.py"
# Two servers share this machine: one that has nothing to do must not spin.
MACS = [*EP2_ARGS, "--sleep-on-idle", "--moe-a2a-backend", "macs", "--macs-preset"]
ONE = ["--tp", "1", *CPU_ARGS, "--sleep-on-idle"]
# name -> (arguments, extra environment)
KINDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "absent": (ONE, {"SGLANG_PLUGINS": "none"}),  # the plugin is not loaded
    "installed": (ONE, {}),  # loaded, and not asked for anything
    "off": ([*MACS, "off"], {}),
    "inf": ([*MACS, "rank", "--macs-gamma", "inf"], {}),
    "rank": ([*MACS, "rank"], {}),
    "paper": ([*MACS, "paper"], {}),
}
METRICS = ("mean_ttft_ms", "mean_itl_ms", "request_throughput", "output_throughput")


@dataclass(frozen=True)
class Interval:
    """Median of paired ratios, and the 95 % confidence interval of the median."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.4f} [{self.low:.4f}, {self.high:.4f}] over {self.pairs} pairs"


def interval(ratios: list[float], confidence: float = 0.95) -> Interval:
    """By order statistics, from the binomial distribution; needs 6 pairs for 95 %, fewer say nothing."""
    found = stats.quantile_test(ratios, p=0.5).confidence_interval(confidence)
    low, high = (float(found.low), float(found.high)) if math.isfinite(found.high) else (0.0, math.inf)
    return Interval(statistics.median(ratios), low, high, len(ratios))


def verdict(found: Interval, most: float) -> int:
    """0: the median costs at most `most`; 1: it costs more; 2: undecided."""
    return 0 if found.high <= 1 + most else 1 if found.low > 1 + most else 2


# ---- Single requests, paired ---------------------------------------------------------------------------------------


def crops(count: int, side: int = 320) -> list[str]:
    """Different squares of real photographs: no prefix of one request is another's."""
    sources = [Image.open(io.BytesIO(content)).convert("RGB") for content in photograph_files().values()]
    uris = []
    for i in range(count):
        source = sources[i % len(sources)]
        left, top = (i * 37) % (source.width - side + 1), (i * 23) % (source.height - side + 1)
        buffer = io.BytesIO()
        source.crop((left, top, left + side, top + side)).save(buffer, "JPEG", quality=90)
        uris.append(data_uri(buffer.getvalue()))
    return uris


def ask(url: str, model: str, uri: str, number: int) -> float:
    """Seconds of one image chat. The number makes the text new to the prefix cache."""
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": f"{number}: what is this?"}]
    messages = [{"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 4}
    start = time.perf_counter()
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    seconds = time.perf_counter() - start
    answer.raise_for_status()
    return seconds


def measure_requests(urls: list[str], model: str, pairs: int) -> Interval:
    """Each request to both servers, the first one alternating; the first pairs only warm up."""
    uris, ratios = crops(64), []
    for i in range(-4, pairs):
        seconds = [0.0, 0.0]
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            seconds[side] = ask(urls[side], model, uris[i % len(uris)], i)
        if i >= 0:
            ratios.append(seconds[1] / seconds[0])
    return interval(ratios)


# ---- SGLang's bench_serving ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One run of bench_serving: requests of `images` pictures each, at most `concurrency` at once.

    repeated: every run sends the same requests, to servers that keep what they made of a picture's pixels but no
    prefix (REPEATED_FLAGS): what is timed is the model, not the preparation of pictures.
    """

    prompts: int = 16
    resolution: str = "320x320"
    images: int = 1
    concurrency: int = 4
    repeated: bool = False


REPEATED_FLAGS = ["--disable-radix-cache", "--mm-preprocess-cache-size-mb", "4096"]


def bench_arguments(url: str, model: str, workload: Workload, out: Path, seed: int) -> list[str]:
    """One run of the image workload; results are appended to `out` as one line of JSON."""
    return [
        "--backend", "sglang-oai-chat", "--base-url", url, "--model", model, "--dataset-name", "image",
        "--image-count", str(workload.images), "--image-resolution", workload.resolution,
        "--num-prompts", str(workload.prompts), "--max-concurrency", str(workload.concurrency),
        "--random-input-len", "32", "--random-output-len", "8",
        "--random-range-ratio", "1.0", "--warmup-requests", "1", "--disable-tqdm",
        "--seed", "0" if workload.repeated else str(seed), "--output-file", str(out),
        *([] if workload.repeated else ["--flush-cache"]),
    ]  # fmt: skip


def bench_environment() -> dict[str, str]:
    """bench_serving imports Hugging Face's `datasets` for workloads not used here; without it a stand-in does."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if importlib.util.find_spec("sgl_kernel") is None:
        env |= cpu_compat.environment(1)
    if importlib.util.find_spec("datasets") is None:
        env["PYTHONPATH"] = os.pathsep.join([str(BENCH_SITE), env.get("PYTHONPATH", "")])
    return env


class Bench:
    """SGLang's bench_serving, imported once (benchmarks/bench_forks.py); a context manager. Runs follow one another."""

    def __enter__(self) -> "Bench":
        OUT.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, str(FORKS)],
            env=bench_environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # a run that is under way, too
        self.process.communicate()

    def __call__(self, url: str, model: str, workload: Workload, seed: int = 0) -> dict:
        """The result of one run; a repeated workload takes no seed. Raises ServerError with the output's end if it
        failed or requests were lost.
        """
        out = OUT / f"bench-{url.rpartition(':')[2]}.jsonl"
        out.unlink(missing_ok=True)
        print(json.dumps(bench_arguments(url, model, workload, out, seed)), file=self.process.stdin, flush=True)
        status, said = json.loads(self.process.stdout.readline() or '[-1, "it died"]')
        if status or not out.exists():
            raise ServerError(f"bench_serving ended with {status}:\n{said}")
        result = json.loads(out.read_text().splitlines()[-1])
        if result["completed"] != workload.prompts:
            raise ServerError(f"bench_serving: {result['completed']} of {workload.prompts} requests answered")
        return result


Pairs = dict[str, list[tuple[float, float]]]


def measure_bench(
    bench: Bench, urls: list[str], model: str, rounds: int, workload: Workload, keep: Callable[[Pairs], None] = id
) -> Pairs:
    """(first, second) of every round, by metric. Runs A B, B A, ...; each round has prompts of its own, the same for
    both servers. keep: gets what there is after every round.
    """
    pairs: Pairs = {metric: [] for metric in METRICS}
    for i in range(rounds):
        results: list[dict] = [{}, {}]
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            results[side] = bench(urls[side], model, workload, seed=i)
        for metric in METRICS:
            pairs[metric].append((results[0][metric], results[1][metric]))
        ratios = (f"{metric} {results[1][metric] / results[0][metric]:.3f}" for metric in METRICS)
        print(f"round {i + 1} of {rounds}: " + ", ".join(ratios), flush=True)
        keep(pairs)
    return pairs


def ratio_interval(pairs: list[tuple[float, float]]) -> Interval:
    """Of second to first."""
    return interval([second / first for first, second in pairs])


# ---- Servers -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def servers(kinds: list[str], model: Path):
    """Both servers on this machine; yields their URLs."""
    with contextlib.ExitStack() as stack:
        urls = []
        for i, kind in enumerate(kinds):
            args, env = KINDS[kind]
            log = OUT / f"{i}-{kind}.log"
            urls.append(stack.enter_context(Server(model, args, env=env, log=log)).url)
        yield urls


def run(options: argparse.Namespace, urls: list[str], model: str) -> int:
    names = options.compare if not options.urls else options.urls
    if options.measure == "bench":
        workload = Workload(options.prompts, options.resolution, options.images, options.concurrency)
        with Bench() as bench:
            pairs = measure_bench(bench, urls, model, options.rounds, workload)
        for metric, of_metric in pairs.items():
            print(f"{metric:<20} {names[1]} / {names[0]}: {ratio_interval(of_metric)}")
        return 0
    found = measure_requests(urls, model, options.pairs)
    print(f"latency of a request, {names[1]} / {names[0]}: {found}")
    if options.most is None:
        return 0
    status = verdict(found, options.most)
    print(
        f"at most {1 + options.most:g}: "
        + ("shown", "NOT so", "cannot be said: more --pairs, or a quieter machine")[status]
    )
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", nargs=2, choices=list(KINDS), default=["off", "inf"], metavar="KIND")
    parser.add_argument("--urls", nargs=2, metavar="URL", help="servers that run already, instead of --compare")
    parser.add_argument("--model", help="path of the model behind --urls")
    parser.add_argument("--measure", choices=("requests", "bench"), default="requests")
    parser.add_argument("--pairs", type=int, default=200, help="requests to each server")
    parser.add_argument("--rounds", type=int, default=6, help="runs of bench_serving on each server")
    parser.add_argument("--prompts", type=int, default=16, help="requests of one run of bench_serving")
    parser.add_argument("--resolution", default="320x320", help="of bench_serving's images")
    parser.add_argument("--images", type=int, default=1, help="in each request of bench_serving")
    parser.add_argument("--concurrency", type=int, default=4, help="requests of bench_serving at once")
    parser.add_argument("--most", type=float, help="share by which the second may be slower, e.g. 0.01")
    options = parser.parse_args(argv)
    try:
        if options.urls:
            if not options.model:
                parser.error("--urls needs --model, whose tokenizer counts the prompts")
            return run(options, [url.rstrip("/") for url in options.urls], options.model)
        model = tiny_models.ensure(ROOT / "build" / "models" / "tiny-qwen3-vl-moe", "qwen3_vl_moe")
        with servers(options.compare, model) as urls:
            return run(options, urls, str(model))
    except (ServerError, requests.RequestException) as error:
        print(f"check_serving: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""The real SGLang server on GPUs with DeepEP, MACS off, at infinite gamma and at gamma 1.0: same tokens, bounds kept.

    python3 scripts/gpu/serve_check.py --out FILE [--launch "2 ranks, low latency" ...]

Two GPUs. A launch is a model, a number of ranks and a DeepEP mode; its three servers (off, infinite gamma, gamma 1.0)
run at the same time. Models have hidden size 2048 and random weights. Exit 0 only if greedy tokens are equal with MACS
off and at infinite gamma and every bound held on every rank.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from serving import Server, ServerError, data_uri, photograph_files, prompt  # noqa: E402

from sglang_macs import tiny_models  # noqa: E402

SIZE = {"hidden": 2048, "layers": 4, "num_experts": 32, "top_k": 4, "intermediate": 768}
COMMON = [
    *("--mem-fraction-static", "0.8", "--max-total-tokens", "8192", "--max-running-requests", "16"),
    *("--attention-backend", "triton", "--mm-attention-backend", "sdpa", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--chunked-prefill-size", "512", "--random-seed", "1"),
    *("--moe-a2a-backend", "macs", "--macs-verify", "true", "--macs-min-tokens", "0"),
]
RUNS = {"off": ["--macs-preset", "off"], "inf": ["--macs-gamma", "inf"], "1.0": ["--macs-gamma", "1.0"]}
# Rows per rank of DeepEP's low-latency buffers: ranks times tokens must divide by 4 for DeepGEMM, and a chunk must fit.
ENVIRONMENT = {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256"}


@dataclass(frozen=True)
class Launch:
    """kind: of tiny model; text: the server gets no images; flags: beside the common ones."""

    ranks: int
    mode: str
    kind: str = "qwen3_vl_moe"
    fp8: bool = False
    flags: tuple[str, ...] = ()
    gpu: str = "0"  # of a launch with one rank

    @property
    def arguments(self) -> list[str]:
        n = str(self.ranks)
        parallel = ["--tp", n, "--ep-size", n]
        if self.ranks > 1:
            parallel += ["--dp", n, "--enable-dp-attention"]
        else:  # one rank has nothing to balance: its experts are bounded
            parallel += ["--macs-scope", "expert"]
        return [*COMMON, *parallel, "--deepep-mode", self.mode, *self.flags]


LAUNCHES = {
    "2 ranks, low latency": Launch(2, "low_latency"),
    "2 ranks, normal": Launch(2, "normal"),
    "1 rank, low latency": Launch(1, "low_latency", gpu="0"),
    "2 ranks, FP8 blocks": Launch(2, "low_latency", kind="qwen3_moe", fp8=True, flags=("--moe-runner-backend", "macs")),
    "2 ranks, two batches": Launch(2, "normal", kind="qwen3_moe", flags=("--enable-two-batch-overlap",)),
}


def model_of(launch: Launch) -> Path:
    name = f"gpu-{launch.kind}{'-fp8' if launch.fp8 else ''}"
    options = dict(SIZE)
    if launch.kind == "qwen3_moe":
        options |= {"fp8": launch.fp8, "head_dim": 64}
    return tiny_models.ensure(ROOT / "build" / "models" / name, launch.kind, **options)


def requests(launch: Launch) -> list[tuple[str, str | None]]:
    """(prompt, image) pairs: both photographs under several questions, and text."""
    text = [(prompt(f"{i} How many experts answer, and which of them waits? " * 6), None) for i in range(4)]
    if launch.kind != "qwen3_vl_moe":
        return text + [
            (prompt(f"{i} the slowest rank sets the pace of the whole batch. " * 12), None) for i in range(4)
        ]
    pictures = [data_uri(content) for content in photograph_files().values()]
    return text + [(prompt(f"{i} What is in this picture?", images=1), pictures[i % 2]) for i in range(6)]


def serve(name: str, launch: Launch, run: str) -> dict:
    """Tokens and counters of one server; {"error": ...} if it failed."""
    log = ROOT / "build" / f"gpu-{name.replace(', ', '-').replace(' ', '_')}-{run}.log"
    env = ENVIRONMENT | ({"CUDA_VISIBLE_DEVICES": launch.gpu} if launch.ranks == 1 else {})
    try:
        with Server(model_of(launch), [*launch.arguments, *RUNS[run]], env=env, log=log, timeout=400) as server:
            started, tokens = time.perf_counter(), []
            for text, image in requests(launch):
                tokens.append(server.generate(text, image, max_new_tokens=8).ids)
            with ThreadPoolExecutor(8) as pool:  # together, so that batches mix; their tokens may depend on the batch
                list(pool.map(lambda r: server.generate(r[0], r[1], max_new_tokens=4), requests(launch) * 2))
            seconds = time.perf_counter() - started
            states = [state["macs"] for state in server.get("/server_info")["internal_states"]]
    except ServerError as error:
        return {"error": str(error)[-1500:]}
    return {"start_s": server.start_seconds, "requests_s": seconds, "tokens": tokens, "states": states}


def judge(launch: Launch, runs: dict[str, dict]) -> list[str]:
    """What is wrong, in words; empty where all is well."""
    wrong = [f"gamma {run}: {found['error'][:200]}" for run, found in runs.items() if "error" in found]
    if wrong:
        return wrong
    if runs["off"]["tokens"] != runs["inf"]["tokens"]:
        wrong.append("greedy tokens differ between off and infinite gamma")
    for run in ("inf", "1.0"):
        for state in runs[run]["states"]:
            if not state["planned"] or not state["checks"].get("bound") or state["misaligned"]:
                wrong.append(f"gamma {run}: rank {state['rank']} did not plan, prove or align")
            if sum(state["violations"].values()):
                wrong.append(f"gamma {run}: rank {state['rank']} violated {state['violations']}")
    clipped = "clipped_visual" if launch.kind == "qwen3_vl_moe" else "clipped_text"
    if not sum(state["own"][clipped] for state in runs["1.0"]["states"]):
        wrong.append("gamma 1.0 clipped nothing")
    return wrong


def summary(run: dict) -> dict:
    """What goes into the results: counters without the layers."""
    if "error" in run:
        return run
    names = ("rank", "dispatches", "planned", "skipped", "misaligned", "checks", "violations", "own", "plan_seconds")
    return run | {"states": [{name: state[name] for name in names} for state in run["states"]]}


def gpus() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    return f"{names[0]} x {len([name for name in names if name])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--launch", nargs="+", default=list(LAUNCHES), choices=list(LAUNCHES))
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    for name in options.launch:
        model_of(LAUNCHES[name])  # before the threads: two must not build one model
    with ThreadPoolExecutor(len(RUNS) * len(options.launch)) as pool:
        jobs = {(name, run): pool.submit(serve, name, LAUNCHES[name], run) for name in options.launch for run in RUNS}
        found = {job: future.result() for job, future in jobs.items()}
    wrong, rows = [], []
    for name in options.launch:
        runs = {run: found[name, run] for run in RUNS}
        wrong += [f"{name}: {what}" for what in judge(LAUNCHES[name], runs)]
        rows += [{"op": "serve", "case": {"launch": name, "gamma": run}, **summary(runs[run])} for run in RUNS]
        print(f"{name}:", ", ".join(f"{run} {runs[run].get('start_s', 0):.0f} s" for run in RUNS), flush=True)
    result = {
        "gpu": gpus(),
        "commit": options.commit,
        "command": "python3 scripts/gpu/serve_check.py",
        "date": datetime.now(UTC).date().isoformat(),
        "wrong": wrong,
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(result, indent=1))
    print("\n".join(wrong) or "serve_check OK: equal tokens at infinite gamma, every bound held")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The real SGLang server on GPUs with DeepEP, MACS off, at infinite gamma and at gamma 1.0: same tokens, bounds kept.

    python3 scripts/gpu/serve_check.py --out FILE [--mode low_latency|normal]

Two GPUs (tp 2, dp 2, ep 2), a Qwen3-VL-MoE of hidden size 2048 with random weights, image and text requests.
Exit 0 only if greedy tokens are equal with MACS off and at infinite gamma and every bound held on both ranks.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from serving import Server, data_uri, photograph_files, prompt  # noqa: E402

from sglang_macs import tiny_models  # noqa: E402

FLAGS = [
    *("--tp", "2", "--dp", "2", "--enable-dp-attention", "--ep-size", "2", "--mem-fraction-static", "0.5"),
    *("--attention-backend", "triton", "--mm-attention-backend", "sdpa", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--max-running-requests", "16", "--chunked-prefill-size", "512"),
]
RUNS = {"off": ["--macs-preset", "off"], "inf": ["--macs-gamma", "inf"], "1.0": ["--macs-gamma", "1.0"]}


def requests() -> list[tuple[str, str | None]]:
    """(prompt, image) pairs: both photographs under several questions, and text."""
    pictures = [data_uri(content) for content in photograph_files().values()]
    asked = [(prompt(f"{i} What is in this picture?", images=1), pictures[i % 2]) for i in range(6)]
    return asked + [(prompt(f"{i} How many experts answer, and which of them waits? " * 6), None) for i in range(4)]


def serve(model: Path, name: str, mode: str) -> dict:
    """Tokens and counters of one server."""
    macs = ["--moe-a2a-backend", "macs", "--macs-verify", "true", "--macs-min-tokens", "0", *RUNS[name]]
    log = ROOT / "build" / f"gpu-{mode}-{name}.log"
    with Server(model, [*FLAGS, "--deepep-mode", mode, *macs], log=log, timeout=400) as server:
        started, tokens = time.perf_counter(), []
        for text, image in requests():
            tokens.append(server.generate(text, image, max_new_tokens=8).ids)
        seconds = time.perf_counter() - started
        states = [state["macs"] for state in server.get("/server_info")["internal_states"]]
    return {"start_s": server.start_seconds, "requests_s": seconds, "tokens": tokens, "states": states}


def judge(runs: dict[str, dict]) -> list[str]:
    """What is wrong, in words; empty where all is well."""
    wrong = []
    if runs["off"]["tokens"] != runs["inf"]["tokens"]:
        wrong.append("greedy tokens differ between off and infinite gamma")
    for name in ("inf", "1.0"):
        for state in runs[name]["states"]:
            if not state["planned"] or not state["checks"].get("bound") or state["misaligned"]:
                wrong.append(f"gamma {name}: rank {state['rank']} did not plan, prove or align")
            if sum(state["violations"].values()):
                wrong.append(f"gamma {name}: rank {state['rank']} violated {state['violations']}")
    if not sum(state["own"]["clipped_visual"] for state in runs["1.0"]["states"]):
        wrong.append("gamma 1.0 clipped nothing")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--mode", default="low_latency", choices=["low_latency", "normal"])
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    size = {"hidden": 2048, "layers": 4, "num_experts": 32, "top_k": 4, "intermediate": 768}
    model = tiny_models.ensure(ROOT / "build" / "models" / "gpu-vl", "qwen3_vl_moe", **size)
    runs = {}
    for name in RUNS:
        runs[name] = serve(model, name, options.mode)
        Path(options.out).write_text(json.dumps(runs))  # what there is, should a later server fail
        print(name, f"start {runs[name]['start_s']:.0f} s, requests {runs[name]['requests_s']:.1f} s", flush=True)
    wrong = judge(runs)
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    result = {
        "gpu": f"{gpus[0]} x {len([g for g in gpus if g])}",
        "commit": options.commit,
        "command": f"python3 scripts/gpu/serve_check.py --mode {options.mode}",
        "date": datetime.now(UTC).date().isoformat(),
        "wrong": wrong,
        "rows": [{"op": "e2e", "case": {"gamma": name, "mode": options.mode}, **run} for name, run in runs.items()],
    }
    Path(options.out).write_text(json.dumps(result, indent=1))
    print("\n".join(wrong) or "serve_check OK: equal tokens at infinite gamma, every bound held")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The real SGLang server on GPUs with DeepEP, MACS off, at infinite gamma and at gamma 1.0: same tokens, bounds kept.

    python3 -m benchmarks.gpu.serve_check --out FILE [--launch "2 ranks, low latency" ...]

A launch (gpu_launches.py) is a model, a number of ranks and a DeepEP mode; it has three servers (off, infinite gamma,
gamma 1.0), and where experts have copies a fourth without any. Exit 0 only if greedy tokens are equal with MACS off and
at infinite gamma, every bound held on every rank, the kernels that carry planned batches are those asked for, and
metrics and trace, where a launch asks for them, tell what the counters tell. FILE is written again after every launch.
"""

import argparse
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from benchmarks.gpu import mps, result_file
from benchmarks.gpu.gpu_launches import LAUNCHES, Launch, start
from benchmarks.serving import Server, data_uri, photograph_files, prompt, states
from sglang_macs.observe import metrics, trace

ROOT = Path(__file__).resolve().parents[2]

# Servers start side by side, and answer in turn: kernels that wait for their peers, of several servers on one GPU, may
# each hold what the others' peers need.
TURN = Lock()
SUMMED = "one kernel over the peers' memory sums the exchange"  # what such a server says


def requests(launch: Launch) -> list[tuple[str, str | None]]:
    """(prompt, image) pairs: both photographs under several questions, and text. Two where ranks share a GPU, which
    meet on the host twice a layer; twice as many where EPLB needs passes.
    """
    text = [(prompt(f"{i} How many experts answer, and which of them waits? " * 6), None) for i in range(4)]
    if not launch.slot:
        return text + [
            (prompt(f"{i} the slowest rank sets the pace of the whole batch. " * 12), None) for i in range(4)
        ]
    pictures = [data_uri(content) for content in photograph_files().values()]
    asked = text + [
        (prompt(f"{i} What is in this picture?", images=1, slot=launch.slot), pictures[i % 2]) for i in range(6)
    ]
    return asked[3 : 7 if launch.moves else 5] if launch.one_gpu else asked


def observe(server: Server, folder: Path, states: list[dict]) -> list[str]:
    """What metrics and trace say otherwise than the counters of the same server; empty where all is well."""
    time.sleep(2)  # an idle server publishes once a second
    published = server.get("/metrics")
    expected = {metric.series for metric in metrics.METRICS for state in states if metric.read(state)}
    wrong = [f"no series {series}" for series in sorted(expected) if series not in published]
    read = trace.load(str(folder))
    for stage, rows in zip(("before", "after"), read.rank_rows(), strict=True):
        for i, layer in enumerate(read.layers):
            counted = states[0]["layers"][str(layer)][f"rows_{stage}"]
            if rows[:, i].sum(axis=0).tolist() != counted:
                wrong.append(f"layer {layer}, rows {stage}: the trace has other sums than {counted}")
    if not read.pictures:
        wrong.append("the trace has no picture")
    return wrong


def serve(name: str, launch: Launch, run: str, environment: dict[str, str]) -> dict:
    """Tokens and counters of one server; {"error": ...} if it failed."""
    log = ROOT / "build" / f"gpu-{name.replace(', ', '-').replace(' ', '_')}-{run}.log"
    traced = log.with_suffix(".trace")
    observes = launch.observed and run == "1.0"
    flags = ["--enable-metrics", "--macs-trace", str(traced)] if observes else []
    if launch.bounded:  # passes that are recounted run no graphs
        flags += ["--macs-verify", "false", "--macs-verify-every", "2"]
    served = launch.without_copies if run == "plain" else launch
    try:
        with start(served, [*launch.runs[run], *flags], log, environment) as server, TURN:
            started, tokens, length = time.perf_counter(), [], 4 if launch.one_gpu else 8
            for text, image in requests(launch):
                tokens.append(server.generate(text, image, max_new_tokens=length).ids)
            with ThreadPoolExecutor(8) as pool:  # together, so that batches mix; their tokens may depend on the batch
                list(pool.map(lambda r: server.generate(r[0], r[1], max_new_tokens=length // 2), requests(launch) * 2))
            seconds = time.perf_counter() - started
            counters = states(server)
            observed = observe(server, traced, counters) if observes else None
            log_text = server.log_text()
    except Exception as error:  # the other servers go on, and this one's failure is a result
        return {"error": f"{type(error).__name__}: {error}"[-1500:]}
    found = {"start_s": server.start_seconds, "requests_s": seconds, "tokens": tokens, "states": counters}
    if carrier := said_to_carry(log_text):
        found["carrier"] = carrier
    if SUMMED in log_text:
        found["by_peers"] = True
    if served.moves:
        found["rebalanced"] = log_text.count("rebalance end")
    return found if observed is None else found | {"observed": observed}


def said_to_carry(log: str) -> str:
    """The server's own line about what carries its planned batches; "" if it has none."""
    line = re.search(r"^sglang-macs: (.* carries .*)$", log, re.MULTILINE)
    return line.group(1) if line else ""


def judge(launch: Launch, runs: dict[str, dict]) -> list[str]:
    """What is wrong, in words; empty where all is well."""
    wrong = [f"gamma {run}: {found['error'][:200]}" for run, found in runs.items() if "error" in found]
    if wrong:
        return wrong
    wrong += judge_copies(launch, runs) if launch.redundant else []
    if not launch.redundant and runs["off"]["tokens"] != runs["inf"]["tokens"]:
        wrong.append("greedy tokens differ between off and infinite gamma")
    # The first token may be right still: [311, 0, 0, 0] was seen.
    silent = [run for run, found in runs.items() if any(not any(answer[1:]) for answer in found["tokens"])]
    wrong += [f"gamma {run}: an answer goes on with token 0 alone, which is what NaN becomes" for run in silent]
    for run in ("inf", "1.0"):
        for state in runs[run]["states"]:
            if not state["planned"] or not state["checks"].get("bound") or state["misaligned"]:
                wrong.append(f"gamma {run}: rank {state['rank']} did not plan, prove or align")
            passes = state["dispatches"] - state["skipped"].get("outside", 0)  # where decode graphs are captured
            carried = passes if launch.layers_are_graphs else state["planned"]  # of bounded dispatches
            asked_of = ("fused", launch.plans_fused, state["planned"]), ("bounded", launch.bounded, carried)
            for way, asked, of in asked_of:
                if state[way] != (of if asked else 0):
                    wrong.append(f"gamma {run}: rank {state['rank']}: {state[way]} of {of} were {way}")
            if launch.layers_are_graphs and not state["graphs"]:
                wrong.append(f"gamma {run}: rank {state['rank']}: no layer was a CUDA graph")
            if launch.fused and not state["fused_region"]["rounds"]:
                wrong.append(f"gamma {run}: rank {state['rank']}: the fused kernels carried nothing")
            if sum(state["violations"].values()):
                wrong.append(f"gamma {run}: rank {state['rank']} violated {state['violations']}")
        if launch.peers and not runs[run].get("by_peers"):
            wrong.append(f"gamma {run}: the log does not say that peers' memory sums the exchange")
        if launch.fused and not runs[run].get("carrier", "").startswith("the fused dispatch"):
            wrong.append(f"gamma {run}: the log does not say that the fused dispatch carries")
    wrong += [f"gamma 1.0: {what}" for what in runs["1.0"].get("observed", [])]
    modality = "visual" if launch.slot else "text"
    for what in () if launch.redundant else ("clipped", "rerouted"):
        if not sum(state["own"][f"{what}_{modality}"] for state in runs["1.0"]["states"]):
            wrong.append(f"gamma 1.0: no {modality} assignment was {what}")
    return wrong


def judge_copies(launch: Launch, runs: dict[str, dict]) -> list[str]:
    """What is wrong where experts have copies. An expert's output is the same on every rank, but a rank sums its own
    experts' in bf16 before the ranks are summed: with other places the last bit differs, and a token now and then.
    """
    wrong, plain = [], runs["plain"]["tokens"]
    for run in ("off", "inf"):
        equal = sum(mine == theirs for mine, theirs in zip(runs[run]["tokens"], plain, strict=True))
        runs[run]["equal_to_plain"] = f"{equal} of {len(plain)} answers"
        if 4 * equal < 3 * len(plain):
            wrong.append(f"{run}: {equal} of {len(plain)} answers are those without copies")
    for run in ("inf", "1.0"):
        if not sum(state["own"]["moved_visual"] for state in runs[run]["states"]):
            wrong.append(f"gamma {run}: nothing moved to another replica")
    dropped = sum(state["own"][f"clipped_{m}"] for state in runs["inf"]["states"] for m in ("visual", "text"))
    wrong += [f"infinite gamma clipped {dropped} assignments"] if dropped else []
    still = [run for run, found in runs.items() if found.get("rebalanced") == 0]
    return wrong + [f"{run}: EPLB moved nothing" for run in still]


def summary(run: dict) -> dict:
    """What goes into the results: counters without the layers."""
    if "error" in run:
        return run
    names = (
        "rank",
        "dispatches",
        "planned",
        "fused",
        "bounded",
        "graphs",
        "skipped",
        "misaligned",
        "checks",
        "violations",
    )
    names += ("own", "plan_seconds", "fused_region")
    return run | {"states": [{name: state[name] for name in names} for state in run["states"]]}


def run_all(names: list[str], at_once: int) -> Iterator[tuple[str, dict[str, dict]]]:
    """(launch, results by run) as they come, in order; at most `at_once` servers live at a time."""
    sharing = [name for name in names if LAUNCHES[name].one_gpu]
    # Of one server: they answer in turn, so that all of them may have the same SMs. With 16 % a rank
    # instead of 48 % two ranks answered NaN, MACS off or on (docs/results/gpu.md).
    clients = max((LAUNCHES[name].ranks for name in sharing), default=0)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(mps.shared_gpu(clients)) if sharing else {}
        pool = stack.enter_context(ThreadPoolExecutor(at_once))
        jobs = {
            name: {
                run: pool.submit(serve, name, LAUNCHES[name], run, client if name in sharing else {})
                for run in LAUNCHES[name].runs
            }
            for name in names
        }
        for name, of_launch in jobs.items():
            yield name, {run: future.result() for run, future in of_launch.items()}


def build_models(names: list[str]) -> int:
    """A process for every model, and the plugin of launches over TCP; 0 if all succeeded."""
    if any(LAUNCHES[name].over_tcp for name in names):
        subprocess.run(["bash", str(ROOT / "tools" / "rma_tcp" / "build.sh")], check=True)
    models = {LAUNCHES[name].model_path(): name for name in names}
    command = [sys.executable, "-m", "benchmarks.gpu.serve_check", "--build-only", "--launch"]
    builders = [subprocess.Popen([*command, name]) for name in models.values()]
    return max(abs(builder.wait()) for builder in builders)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser, required=False)
    parser.add_argument("--launch", nargs="+", default=list(LAUNCHES), choices=list(LAUNCHES))
    parser.add_argument("--at-once", type=int, default=4, help="servers that live at the same time")
    parser.add_argument("--build-only", action="store_true", help="build the models of the launches and end")
    options = parser.parse_args()
    if options.build_only and len(options.launch) == 1:
        LAUNCHES[options.launch[0]].model()
        return 0
    if failed := build_models(options.launch):  # before the threads: two must not build one model
        return failed
    if options.build_only:
        return 0
    if options.out is None:
        parser.error("--out is needed")
    wrong, rows = [], []
    gpus = max(LAUNCHES[name].gpus for name in options.launch)
    for name, runs in run_all(options.launch, options.at_once):
        wrong += [f"{name}: {what}" for what in judge(LAUNCHES[name], runs)]
        rows += [{"op": "serve", "case": {"launch": name, "gamma": run}, **summary(runs[run])} for run in runs]
        result_file.write(options.out, rows, commit=options.commit, gpus=gpus, wrong=wrong)
        print(f"{name}:", ", ".join(f"{run} {of.get('start_s', 0):.0f} s" for run, of in runs.items()), flush=True)
    print("\n".join(wrong) or "serve_check OK: equal tokens at infinite gamma, every bound held")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the tables of the documentation: flags and metrics from the code, figures from docs/results.

`--check` only compares.

A table stands between `<!-- NAME: written by make format -->` and `<!-- /NAME -->`, where NAME is a key of TABLES.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from sglang_macs.config import flag_table
from sglang_macs.engine import families
from sglang_macs.observe import metrics
from sglang_macs.simulate import exchange
from sglang_macs.simulate.machines import MACHINES, MODELS

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- (\w+): written by make format -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def results(name: str) -> dict:
    """One file of docs/results."""
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def matching(pattern: str) -> list[dict]:
    """All files of docs/results of such names, in their order."""
    return [results(path.stem) for path in sorted((ROOT / "docs" / "results").glob(f"{pattern}.json"))]


def only(pattern: str) -> str:
    """The one file of docs/results of that name, whichever GPU it names."""
    (path,) = (ROOT / "docs" / "results").glob(f"{pattern}.json")
    return path.stem


def source(found: dict) -> str:
    """Where figures come from, in one line."""
    return f"{found['gpu']}, {found['date']}, commit {found['commit'][:9]}, `{found['command']}`."


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header), ["---"] * len(list(header)), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def straggler_table() -> str:
    """Time of the expert stage on the slowest rank, for each routing and method; and the share of the ideal."""
    found = results("straggler_h200")
    rows, before = [], {}
    for row in found["rows"]:
        case, total = row["case"], sum(row["rows"])
        key = (case["tokens_per_rank"], case["routing"])
        if case["method"] == "unclipped":
            before[key] = total
        dropped = f"{row['assignments']['dropped'] / before[key]:.1%}"
        times = []
        for when in ("alone", "together"):
            share = f" ({row[when]['share_of_ideal']:.0%})" if when in row else ""
            times.append(f"{max(row[f'{when}_us']):.0f}{share}")
        gamma = case.get("gamma", "")
        rows.append([*key, case["method"], gamma, f"{max(row['rows']):,}", dropped, *times])
    header = ["tokens per rank", "routing", "method", "gamma", "rows of the slowest rank", "dropped"]
    return source(found) + "\n\n" + markdown([*header, "alone, us", "together, us"], rows)


def overhead_table() -> str:
    """The plan in front of DeepEP's low-latency dispatch and combine, on one GPU."""
    found = results("overhead_h200")
    return source(found) + "\n\n" + overhead_rows(found["rows"])


def overhead_several_table() -> str:
    """The same on several GPUs, with the exchange; then normal mode, as a share of the whole layer."""
    parts = []
    for found in matching("overhead_*x[248]"):
        of_mode = {mode: [row for row in found["rows"] if row["case"]["mode"] == mode] for mode in MODES}
        parts += [source(found), *(overhead_rows(rows) for rows in of_mode.values() if rows)]
    return "\n\n".join(parts)


MODES = ("low latency", "normal")
OVERHEAD = {
    "T": lambda row: row["case"]["T"],
    "H": lambda row: row["case"]["H"],
    "dispatch": lambda row: row["case"]["dtype"],
    "clipped": lambda row: f"{row['clipped_share']:.0%}",
    "the device": lambda row: row["case"]["device"],
    "DeepEP, us": lambda row: f"{row['deepep_us']:.1f}",
    "plan + DeepEP, us": lambda row: f"{row['planned_us']:.1f}",
    "plan alone, us": lambda row: f"{row['plan_us']:.1f}",
    "exchange alone, us": lambda row: f"{row['exchange_us']:.1f}",
    "experts, us": lambda row: f"{row['experts_us']:.0f}",
    "overhead, us": lambda row: f"{row['overhead_us']:.1f}",
    "of DeepEP": lambda row: f"{row['overhead_percent']:.0f} %",
    "by peers: plan, us": lambda row: f"{row['plan_by_peers_us']:.1f}",
    "exchange, us": lambda row: f"{row['exchange_by_peers_us']:.1f}",
    "overhead by peers, us": lambda row: f"{row['overhead_by_peers_us']:.1f}",
    "of the layer": lambda row: f"{row['overhead_percent_of_layer']:.1f} %",
    "by peers": lambda row: f"{row['overhead_by_peers_percent_of_layer']:.1f} %",
}
ONLY_IN = {
    "the device": "device",
    "exchange alone, us": "exchange_us",
    "experts, us": "experts_us",
    "by peers: plan, us": "plan_by_peers_us",
    "exchange, us": "exchange_by_peers_us",
    "overhead by peers, us": "overhead_by_peers_us",
    "of the layer": "overhead_percent_of_layer",
    "by peers": "overhead_by_peers_percent_of_layer",
}


def overhead_rows(rows: list[dict]) -> str:
    """A table with the columns that these rows have."""
    keys = {*rows[0], *rows[0]["case"]}
    there = {name: cell for name, cell in OVERHEAD.items() if ONLY_IN.get(name, "deepep_us") in keys}
    return markdown(there, [[cell(row) for cell in there.values()] for row in rows])


def fused_table() -> str:
    """The fused dispatch and combine beside DeepEP and the composed path; a table for every run in docs/results."""
    parts = []
    for found in matching("fused_*"):
        sizes: dict[tuple, dict[tuple[str, float], dict]] = {}
        for row in found["rows"]:
            case = row["case"]
            size = tuple(case[name] for name in ("R", "T", "H", "dtype"))
            # DeepEP's rows have no importance: they stand beside every one. Runs before version 4 knew only one.
            importance = case.get("importance", None if "deepep" in row["op"] else "entropy_gate")
            sizes.setdefault(size, {}).setdefault(importance, {})[row["op"], case["clipped"]] = row
        ops = {row["op"] for row in found["rows"]}
        there = {name: column for name, column in FUSED_COLUMNS.items() if column[0] in ops}
        rows = [
            [*size, importance, *(fused_cell(of.get(None, {}) | timed, *column) for column in there.values())]
            for size, of in sizes.items()
            for importance, timed in of.items()
            if importance is not None
        ]
        parts.append(source(found) + "\n\n" + markdown(["R", "T", "H", "rows", "importance", *there], rows))
    return "\n\n".join(parts) or "Nothing measured yet."


# Columns by heading: operation, and the share of assignments that are clipped.
FUSED_COLUMNS = {
    "dispatch": ("fused_dispatch", 0.0),
    "20 % clipped": ("fused_dispatch", 0.2),
    "DeepEP": ("deepep_dispatch", 0.0),
    "plan + DeepEP": ("plan_deepep_dispatch", 0.0),
    "20 % clipped ": ("plan_deepep_dispatch", 0.2),
    "combine": ("fused_combine", 0.0),
    "copying": ("fused_combine_copied", 0.0),
    "DeepEP ": ("deepep_combine", 0.0),
    "both": ("fused_dispatch_combine", 0.0),
    "20 % clipped  ": ("fused_dispatch_combine", 0.2),
    "DeepEP  ": ("deepep_dispatch_combine", 0.0),
    # Ranks that share a GPU: sending and receiving added up (scripts/gpu/time_phases.py).
    "DeepEP in phases": ("phased_deepep_dispatch", 0.0),
    "plan + DeepEP in phases": ("phased_plan_deepep_dispatch", 0.0),
    "DeepEP's combine in phases": ("phased_deepep_combine", 0.0),
}


def fused_cell(timed: dict[tuple[str, float], dict], op: str, clipped: float) -> str:
    """Median in us, and in brackets the floor of our own rows."""
    row = timed.get((op, clipped))
    if row is None:
        return ""
    return f"{row['median_us']:.1f}" + (f" ({row['floor_us']:.1f})" if op.startswith("fused") else "")


def triton_table() -> str:
    """The operators in Triton: on the GPU, and what launching them takes of the host."""
    found = results("triton_h200")
    by_tokens: dict[int, list[str]] = {}
    for row in found["rows"]:
        by_tokens.setdefault(row["T"], []).append(f"{row['median_us']:.0f} ({row['host_us']:.0f})")
    ops = dict.fromkeys(row["op"] for row in found["rows"])
    return source(found) + "\n\n" + markdown(["T", *ops], [[t, *times] for t, times in by_tokens.items()])


def scores_table() -> str:
    """entropy_score beside a copy of the same run."""
    found = results("kernels")
    rows = [
        [row["case"]["T"], row["case"]["H"], f"{row['median_us']:.1f}", f"{row['ratio']:.0%}"]
        for row in found["rows"]
        if row["op"] == "score"
    ]
    return source(found) + "\n\n" + markdown(["T", "H", "entropy_score, us", "of the copy rate"], rows)


def plan_table() -> str:
    """The plan with and without scores, and what of it stands before the exchange."""
    found = results("kernels")
    times: dict[tuple, dict[str, dict]] = {}
    for row in found["rows"]:
        case = row["case"]
        times.setdefault((case["T"], case["H"], case["scope"], case["hot"]), {})[row["op"]] = row

    def us(of: dict[str, dict], op: str) -> str:
        return f"{of[op]['median_us']:.1f}" if op in of else ""

    rows = [
        [*key, *(us(of, op) for op in PLAN.values()), f"{of['plan']['bytes'] / found['copy_bytes_per_us']:.1f}"]
        for key, of in sorted(times.items(), key=lambda item: (item[0][2] == "expert", item[0][3], *item[0][:2]))
        if "plan" in of
    ]
    header = ["T", "H", "bounds", "skew", *PLAN, "byte floor"]
    return source(found) + "\n\n" + markdown(header, rows)


PLAN = {
    "plan, us": "plan",
    "of these before the exchange": "upto_histogram",
    "the same inputs again": "plan_warm",
    "five operators": "plan_one_by_one",
    "without scores": "plan_without_scores",
    "before the exchange": "upto_histogram_without_scores",
}


def timeline_table() -> str:
    """When the plan's kernels reach their stages: the median warp and the last."""
    found = results("timeline_plan_h200")
    when: dict[tuple[str, str], dict[int, dict]] = {}
    for row in found["rows"]:
        when.setdefault((row["kernel"], row["stage"]), {})[row["case"]["T"]] = row
    tokens = sorted({row["case"]["T"] for row in found["rows"]})

    def times(of: dict[int, dict]) -> list[str]:
        both = ((of.get(t, {}).get(f"{which}_us") for which in ("median", "last")) for t in tokens)
        return ["" if time is None else f"{time:.1f}" for pair in both for time in pair]

    in_order = sorted(when.items(), key=lambda item: item[1][tokens[-1]]["median_us"])
    rows = [[*key, *times(of)] for key, of in in_order]
    header = ["kernel", "stage", *(word for t in tokens for word in (f"T = {t}: median warp, us", "last"))]
    return source(found) + "\n\n" + markdown(header, rows)


def decode_table() -> str:
    """Dispatch, combine and both of batches that are carried as they are routed, and DeepEP's of the same run."""
    found, cases = results("decode_h200x2"), {}
    for row in found["rows"]:
        case = row["case"]
        cases.setdefault((case["dtype"], case["H"], case["T"]), {})[row["op"]] = row
    ops = ("fused_carry", "fused_combine", "fused_carry_combine", "deepep_dispatch_combine")
    rows = [
        [*key, *(f"{of[op]['median_us']:.1f}" for op in ops), f"{of['fused_carry_combine']['ratio']:.2f}"]
        for key, of in sorted(cases.items())
    ]
    return source(found) + "\n\n" + markdown(["rows", "H", "T", "dispatch", "combine", "both", "DeepEP", "ratio"], rows)


def instructions_table() -> str:
    """Cycles for each instruction of straight-line code, first and later passes; and for each jump through it."""
    found = results("instructions_h200")
    taken = {tuple(row["case"].values()): row["cycles"] for row in found["rows"]}
    sizes = sorted({row["case"]["instructions"] for row in found["rows"]})
    rows = []
    for size in sizes:
        row: list[object] = [size, f"{size * 16 // 1024} KB"]
        for warps in (1, 16):
            row += [f"{taken[size, 132, warps, False, cold][0] / size:.1f}" for cold in (True, False)]
        row += [f"{taken[size, 132, 1, True, cold][0] / (size / 32):.0f}" for cold in (True, False)]
        rows.append(row)
    header = ["instructions", "code"]
    for of in ("cycles an instruction, a warp per SM", "16 warps", "cycles a jump"):
        header += [f"{of}, L2 flushed", "not flushed"]
    return source(found) + "\n\n" + markdown(header, rows)


def serve_table() -> str:
    """What the servers counted, and whether their tokens were equal; a table for every run in docs/results."""
    parts = []
    for found in matching("serve_*"):
        runs: dict[str, dict[str, dict]] = {}
        for row in found["rows"]:
            runs.setdefault(row["case"]["launch"], {})[row["case"]["gamma"]] = row
        parts.append(source(found) + "\n\n" + markdown(SERVE, [serve_row(*launch) for launch in runs.items()]))
    return "\n\n".join(parts)


SERVE = ["launch", "tokens, off and infinite gamma", "planned", "of these fused", "bounded", "checks", "violations"]
SERVE += ["clipped at 1.0", "of these re-routed", "start, s"]


def serve_row(launch: str, by_gamma: dict[str, dict]) -> list[object]:
    if failed := [gamma for gamma, run in by_gamma.items() if "error" in run]:
        return [launch, f"no answer ({', '.join(failed)})", *[""] * (len(SERVE) - 2)]

    def total(name: str, *gammas: str) -> int:
        values = (state.get(name, 0) for gamma in gammas for state in by_gamma[gamma]["states"])
        return sum(sum(value.values()) if isinstance(value, dict) else value for value in values)

    kind = "visual" if any(s["own"]["clipped_visual"] for s in by_gamma["1.0"]["states"]) else "text"
    own = [sum(s["own"][f"{name}_{kind}"] for s in by_gamma["1.0"]["states"]) for name in ("clipped", "rerouted")]
    equal = "equal" if by_gamma["off"]["tokens"] == by_gamma["inf"]["tokens"] else "DIFFERENT"
    counts = [total(name, "inf", "1.0") for name in ("planned", "fused", "bounded", "checks", "violations")]
    return [launch, equal, *counts, *own, f"{max(run['start_s'] for run in by_gamma.values()):.0f}"]


def bounded_table() -> str:
    """The bounded permutation against SGLang's kernels, and the grouped GEMM over its rows."""
    found, cases = results("bounded_h200"), {}
    for row in found["rows"]:
        case = row["case"]
        key = (f"{case['T']:,}", case["dtype"], case["gamma"], f"{case['rows']:,}")
        cases.setdefault(key, {})[row["op"]] = row
    ops = ("bounded_permute", "bounded_gather", "grouped_gemm_ends", "grouped_gemm_minus_one")
    rows = [[*key, *(f"{of[op]['median_us']:.0f} ({of[op]['ratio']:.2f})" for op in ops)] for key, of in cases.items()]
    header = ["tokens per rank", "rows", "gamma", "rows of the buffer", "permute", "gather", "GEMM, ends", "GEMM, -1"]
    return source(found) + "\n\n" + markdown(header, rows)


def bench_table() -> str:
    """SGLang's image benchmark, MACS off and at gamma 1.0 in alternation; a table for every run in docs/results."""
    header, parts = ["", "rounds", "off", "gamma 1.0", "ratio", "95 % interval"], []
    for found in matching("bench_*x[248]"):
        rows = []
        for row in found["rows"]:
            if "off" not in row:
                continue
            medians = [f"{statistics.median(row[side]):.2f}" for side in ("off", "on")]
            bounds = "[{:.3f}, {:.3f}]".format(*row["ci95"]) if row["ci95"] else "too few rounds"
            rows.append([row["case"]["metric"], len(row["off"]), *medians, f"{row['ratio']:.3f}", bounds])
        parts += [source(found), markdown(header, rows)]
    return "\n\n".join(parts)


def e2e_table() -> str:
    """The prefill of a real server against SGLang without the plugin; a table for every run in docs/results."""
    parts = []
    for found in matching("e2e_prefill_*"):
        case = found["rows"][0]["case"]
        what = f"{case['layers']} layers, {case['dtype']}, {case['prompts']}, {case['ranks']} ranks."
        rows = [[cell(row) for cell in E2E.values()] for row in found["rows"] if row["case"]["variant"] != "stock"]
        parts.append(f"{source(found)} {what}\n\n{markdown(E2E, rows)}")
        parts += [f"Outlying runs left out: {len(found['outliers'])}; the file lists what was found about each."]
    return "\n\n".join(parts) or "Nothing measured yet."


def e2e_decode_table() -> str:
    """The decode of a real server against SGLang without the plugin; a table for every run in docs/results."""
    parts = []
    for found in matching("e2e_decode_*"):
        case = found["rows"][0]["case"]
        what = f"{case['layers']} layers, {case['dtype']}, {case['ranks']} ranks."
        rows = [[cell(row) for cell in E2E_DECODE.values()] for row in found["rows"]]
        parts += [f"{source(found)} {what}\n\n{markdown(E2E_DECODE, rows)}"]
        parts += [f"Rounds left out: {len(found['outliers'])}; the file says why each."]
    return "\n\n".join(parts) or "Nothing measured yet."


def measured(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def with_bounds(row: dict, name: str, bounds: str, form: str) -> str:
    """A figure of a row, with its 95 % interval if it has one."""
    interval = row[bounds] and f" [{', '.join(format(bound, form) for bound in row[bounds])}]"
    return measured(row[name], form) + (interval or "")


E2E: dict[str, Callable[[dict], str]] = {
    "tokens per rank": lambda row: f"{row['case']['tokens']:,}",
    "max/mean": lambda row: f"{row['case']['skew']:g}",
    "variant": lambda row: row["case"]["variant"],
    "dispatch": lambda row: row["case"]["dispatch"],
    "time": lambda row: with_bounds(row, "ratio", "ci95", ".3f"),
    "TTFT": lambda row: with_bounds(row, "ttft_ratio", "ttft_ci95", ".3f"),
    "of the ideal gain": lambda row: with_bounds(row, "share_of_ideal", "share_of_ideal_ci95", ".0%"),
    "of balance's alone": lambda row: with_bounds(row, "share_of_balance", "share_of_balance_ci95", ".0%"),
    "kernels run": lambda row: measured(row["busy"], ".0%"),
    "plan, us of the host per layer": lambda row: measured(row["host_us_per_layer"], ".0f"),
    "rounds": lambda row: str(row["rounds"]),
}


E2E_DECODE: dict[str, Callable[[dict], str]] = {
    "requests per rank": lambda row: str(row["case"]["requests"]),
    "variant": lambda row: row["case"]["variant"],
    "ITL, ms": lambda row: f"{row['itl_ms']:.2f}",
    "ITL over stock's": lambda row: with_bounds(row, "ratio", "ci95", ".3f"),
    "output tokens/s": lambda row: f"{row['output_tokens_per_s']:,.0f}",
    "TTFT, ms": lambda row: f"{row['ttft_ms']:.0f}",
    "TTFT over stock's": lambda row: with_bounds(row, "ttft_ratio", "ttft_ci95", ".3f"),
    "rounds": lambda row: str(row["rounds"]),
}


def newcomer_table() -> str:
    """Seconds from pip install to the first answer."""
    found = results(only("newcomer_*"))
    rows = [[row["case"]["step"], f"{row['seconds']:.0f}"] for row in found["rows"]]
    return source(found) + "\n\n" + markdown(["step", "s"], [*rows, ["in all", f"{found['total_seconds']:.0f}"]])


def cost_table() -> str:
    """What MACS costs a request where nothing is clipped, and what the installed plugin costs."""
    found, rows = results("cost_cpu"), []
    for row in found["rows"]:
        case, sides = row["case"], row["latency"]["seconds_a_request"]
        ratios = [
            f"{row[k]['ratio']:.3f} [{row[k]['ci95'][0]:.3f}, {row[k]['ci95'][1]:.3f}]" for k in ("latency", "cpu")
        ]
        layer = " > ".join(f"{ms:.2f}" for ms in row["layer_ms"].values()) if "layer_ms" in row else ""
        share = f"{row['plan_share']:.2%}" if "plan_share" in row else ""
        figures = [f"{1e3 * sides[0]:.0f}", *ratios, share, layer, f"{row['load_average']:.1f}"]
        rows.append([case["comparison"], case["model"], row["date"], row["commit"][:9], row["blocks"], *figures])
    header = ["comparison", "model", "date", "commit", "blocks", "request, ms", "latency, ratio", "CPU time, ratio"]
    header += ["plan's CPU time", "a layer decides, ms", "load average"]
    where = f"{found['cpu']}, `{found['command']}`."
    return where + "\n\n" + markdown(header, rows)


def wire_table() -> str:
    """Bytes on the cable between two hosts, by what they are."""
    found, rows = results("wire"), []
    first = found["rows"][0]
    for row in found["rows"]:
        clipped, assigned, dropped = (
            sum(row["own"][f"{name}_{m}"] for m in ("visual", "text")) for name in ("clipped", "assignments", "dropped")
        )
        shares = [f"{n / max(assigned, 1):.1%}" for n in (clipped, dropped)]
        bytes_of = [f"{row[f'{part}bytes'] / 1e6:.1f}" for part in ("", "row_", "exchange_", "other_")]
        saved = f"{1 - row['row_bytes'] / first['row_bytes']:.1%}" if row is not first else ""
        rows.append([row["name"], *shares, *bytes_of, saved, f"{statistics.median(row['seconds']):.2f}"])
    header = ["", "clipped", "dropped", "MB on the cable", "rows", "exchange", "rest", "rows saved", "s a request"]
    where = f"{found['cpu']}, {found['date']}, commit {found['commit'][:9]}, `{found['command']}`."
    return where + "\n\n" + markdown(header, rows)


def replicas_table() -> str:
    """What each choice of replicas leaves, from scripts/replicas_study.py."""
    found = results("replicas")
    by_case = {tuple(row["case"].values()): row for row in found["rows"]}
    choices, gammas = ("linear", "static", "balance"), sorted({row["case"]["gamma"] for row in found["rows"]})
    rows = []
    for ep, redundant in dict.fromkeys((row["case"]["ep"], row["case"]["redundant"]) for row in found["rows"]):
        of = {choice: [by_case[ep, redundant, choice, gamma] for gamma in gammas] for choice in choices}
        cells = [f"{of[choice][0]['max_over_mean']:.3f}" for choice in choices]
        cells += [" / ".join(f"{100 * row['clipped']:.1f}" for row in of[choice]) for choice in choices]
        rows.append([f"EP{ep}", redundant, *cells])
    header = ["", "redundant", "max/mean: linear", "EPLB", "balanced"]
    header += [f"over gamma {' / '.join(map(str, gammas))}, %: linear", "EPLB", "balanced"]
    return f"Simulated, {found['date']}, commit {found['commit'][:9]}, `{found['command']}`.\n\n" + markdown(
        header, rows
    )


def exchange_table() -> str:
    """What the plans' exchange costs, measured and simulated."""
    lines = exchange.table(MACHINES["h200"], MODELS["qwen3-vl-30b-a3b"], (2, 4, 8, 16, 32, 64, 128))
    return markdown(lines[0], lines[1:])


def compat_table() -> str:
    """What each stage of scripts/check_compat.py said about each release; the installed one is tested by CI."""
    found = results("compat")
    pinned = (ROOT / "requirements" / "sglang.txt").read_text(encoding="utf-8").split("sglang==")[1].strip()
    stages = [
        stage for stage in ("hooks", "launch", "server", "families") if any(stage in row for row in found["rows"])
    ]
    rows = [[pinned, *["tested by `make test`"] * len(stages)]]
    for row in found["rows"]:
        if "refused" in row:
            said = row["refused"]["detail"].removeprefix("sglang-macs: ").split(" (")[0]
            rows.append([row["sglang"], "one is lost", "", f'refused: "{said}"', *[""] * (len(stages) - 3)])
        else:
            passed = [row[stage]["passed"] if stage in row else None for stage in stages]
            rows.append([row["sglang"], *({True: "tested", False: "FAILS", None: "not run"}[each] for each in passed)])
    where = f"torch {found['torch']}, {found['date']}, commit {found['commit'][:9]}, `make test-compat`."
    return where + "\n\n" + markdown(["release", *stages], rows)


TABLES: dict[str, Callable[[], str]] = {
    "flags": flag_table,
    "metrics": metrics.table,
    "straggler": straggler_table,
    "overhead": overhead_table,
    "overhead_several": overhead_several_table,
    "serve": serve_table,
    "bounded": bounded_table,
    "bench": bench_table,
    "decode": decode_table,
    "e2e": e2e_table,
    "e2e_decode": e2e_decode_table,
    "newcomer": newcomer_table,
    "triton": triton_table,
    "scores": scores_table,
    "plan": plan_table,
    "timeline": timeline_table,
    "instructions": instructions_table,
    "compat": compat_table,
    "served": families.served_table,
    "refused": families.refused_table,
    "cost": cost_table,
    "replicas": replicas_table,
    "wire": wire_table,
    "exchange": exchange_table,
    "fused": fused_table,
}


def with_tables(text: str) -> str:
    """A page with the current tables between their markers."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> int:
    stale = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))):
        text = page.read_text(encoding="utf-8")
        if (current := with_tables(text)) == text:
            continue
        if "--check" in sys.argv[1:]:
            print(f"{page.relative_to(ROOT)}: a table differs from its source. Run: make format", file=sys.stderr)
            stale = 1
        else:
            page.write_text(current, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())

"""Tables of what was measured on GPUs without a server: kernels, dispatches, the experts' stage."""

from tools.tables import markdown, matching, results, source


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
    # Ranks that share a GPU: sending and receiving added up (benchmarks/gpu/time_phases.py).
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

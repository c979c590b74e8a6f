"""Tables of what servers on GPUs did: checks, benchmarks, from start to finish."""

import statistics
from collections.abc import Callable

from tools.tables import markdown, matching, only, results, source


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
    if of_copies := by_gamma["inf"].get("equal_to_plain"):
        equal = f"{of_copies} as without copies"
    counts = [total(name, "inf", "1.0") for name in ("planned", "fused", "bounded", "checks", "violations")]
    return [launch, equal, *counts, *own, f"{max(run['start_s'] for run in by_gamma.values()):.0f}"]


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


def observe_table() -> str:
    """What --macs-preset observe costs, and whether it sees what the proof counts; for every run in docs/results."""
    parts = []
    for found in matching("observe_*"):
        costs = [row for row in found["rows"] if row["op"] == "e2e_observe"]
        loads = {row["case"]["tokens"]: row for row in found["rows"] if row["op"] == "observed_loads"}
        rows = [[cell(row) for cell in OBSERVE.values()] for row in costs]
        parts += [source(found), markdown(OBSERVE, rows)]
        for tokens, row in loads.items():
            proved = [layer["proof"] for layer in row["max_over_mean"].values()]
            spread = f"{min(proved):.3f} to {max(proved):.3f} by the proof"
            apart = f"what was observed is at most {row['furthest']:.1g} from it"
            parts.append(f"Max/mean of {len(proved)} layers at {tokens:,} tokens: {spread}; {apart}.")
    return "\n\n".join(parts) or "Nothing measured yet."


OBSERVE: dict[str, Callable[[dict], str]] = {
    "tokens per rank": lambda row: f"{row['case']['tokens']:,}",
    "observed": lambda row: {"observe": "one pass in 16", "every": "every pass"}[row["case"]["mode"]],
    "time over off's": lambda row: with_bounds(row, "ratio", "ci95", ".4f"),
    "pass, ms": lambda row: f"{row['pass_ms']:.2f}",
    "rounds": lambda row: str(row["rounds"]),
}


def newcomer_table() -> str:
    """Seconds from pip install to the first answer."""
    found = results(only("newcomer_*"))
    rows = [[row["case"]["step"], f"{row['seconds']:.0f}"] for row in found["rows"]]
    return source(found) + "\n\n" + markdown(["step", "s"], [*rows, ["in all", f"{found['total_seconds']:.0f}"]])

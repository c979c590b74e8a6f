"""Writes the tables of the documentation: flags and metrics from the code, figures from docs/results. And the pinned
release of SGLang, wherever it stands by name (pins.py).

`--check` only compares.

A table stands between `<!-- NAME: written by make format -->` and `<!-- /NAME -->`, where NAME is a key of TABLES.
"""

import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from importlib import metadata

from sglang_macs.config import flag_table
from sglang_macs.engine import families
from sglang_macs.observe import metrics
from sglang_macs.releases import PINNED, SGLANG
from sglang_macs.simulate import exchange
from sglang_macs.simulate.machines import MACHINES, MODELS
from tools import pins
from tools.architectures import dispatching_table
from tools.kernel_tables import (
    bounded_table,
    decode_table,
    fused_table,
    instructions_table,
    overhead_several_table,
    overhead_table,
    plan_table,
    scores_table,
    straggler_table,
    timeline_table,
    triton_table,
)
from tools.server_tables import (
    bench_table,
    e2e_decode_table,
    e2e_table,
    newcomer_table,
    observe_table,
    serve_table,
)
from tools.tables import ROOT, markdown, results

WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}
BLOCK = re.compile(r"(<!-- (\w+): written by make format -->\n).*?(<!-- /\2 -->)", re.DOTALL)


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


def exchange_table() -> str:
    """What the plans' exchange costs, measured and simulated."""
    lines = exchange.table(MACHINES["h200"], MODELS["qwen3-vl-30b-a3b"], (2, 4, 8, 16, 32, 64, 128))
    return markdown(lines[0], lines[1:])


def replicas_table() -> str:
    """What each choice of replicas leaves, from benchmarks/replicas_study.py."""
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


def quality_replicas_table() -> str:
    """Copies of experts before the clip, from lab/evaluate.py."""
    found = results("quality_replicas")
    part = found["replicas"]
    (unclipped,) = (row for row in part["rows"] if row["bound"] is None)
    by_case = {(row["method"], row["bound"]): row for row in part["rows"] if row["bound"] is not None}
    methods, bounds = (sorted({case[i] for case in by_case}, key=key) for i, key in ((0, len), (1, float)))
    rows = []
    for method in methods:
        cells = [(100 * row["share"]["clipped"], row["kl"]) for row in (by_case[method, bound] for bound in bounds)]
        rows.append([f"`{method}`", *(f"{clipped:.1f} / {f'{kl:.1e}' if kl else 0}" for clipped, kl in cells)])
    about = f"{found['gpu'].upper()}, {found['date']}, commit {found['commit'][:9]}, {part['batches']} batches, "
    about += f"{part['requests']} requests; unclipped and linear, the fullest rank has "
    about += f"{unclipped['max_rank_rows_after']['mean']:.2f} times the mean."
    return f"{about}\n\n" + markdown(["clipped, % / KL at bound", *bounds], rows)


def compat_table() -> str:
    """What each stage of scripts/check_compat.py said about each release, and when; CI tests the installed one."""
    stages = ("hooks", "launch", "server", "families")
    rows = [[PINNED, *["tested by `make test`"] * (len(stages) - 1), "tested by `make test-all`"]]
    found: dict[str, dict] = {release: {} for release in SGLANG} | {
        row["sglang"]: row for row in results("compat")["rows"]
    }
    found.pop(PINNED)
    for release, row in sorted(found.items(), reverse=True):
        if "refused" in row:
            said = row["refused"]["detail"].removeprefix("sglang-macs: ").split(" (")[0]
            rows.append([release, "one is lost", "", f'refused: "{said}"', *[""] * (len(stages) - 3)])
        else:
            rows.append([release, *(stage_cell(row.get(stage)) for stage in stages)])
    recorded = [one for row in found.values() for one in row.values() if isinstance(one, dict)]
    runs = sorted({(one["date"], one["commit"], one["torch"]) for one in recorded})
    when = "; ".join(f"{commit} is of {date}, with torch {torch}" for date, commit, torch in runs)
    return f"`make test-compat`, by commit: {when}.\n\n" + markdown(["release", *stages], rows)


def stage_cell(found: dict | None) -> str:
    """One stage of one release: what it said, and of which commit."""
    return f"{'tested' if found['passed'] else 'FAILS'}, {found['commit']}" if found else "not run"


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
    "observe": observe_table,
    "newcomer": newcomer_table,
    "triton": triton_table,
    "scores": scores_table,
    "plan": plan_table,
    "timeline": timeline_table,
    "instructions": instructions_table,
    "compat": compat_table,
    "served": families.served_table,
    "dispatching": dispatching_table,
    "refused": families.refused_table,
    "cost": cost_table,
    "replicas": replicas_table,
    "quality_replicas": quality_replicas_table,
    "wire": wire_table,
    "exchange": exchange_table,
    "fused": fused_table,
}


def wrapped(block: str) -> str:
    """A block whose prose has lines of at most 160 characters; rows of a table are one line each."""
    lines = (line if line.startswith("|") else textwrap.fill(line, 160, **WHOLE_WORDS) for line in block.split("\n"))
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """A page with the current tables between their markers.

    SGLang's models are the pinned release's: in an environment of another one they stay as they are.
    """
    kept = () if metadata.version("sglang") == PINNED else ("dispatching",)
    return BLOCK.sub(
        lambda found: found[0] if found[2] in kept else f"{found[1]}{wrapped(TABLES[found[2]]())}\n{found[3]}", text
    )


def main() -> int:
    stale = 0
    pinned = [ROOT / name for name in pins.FILES]
    for page in sorted({*pinned, *(ROOT / "docs").glob("**/*.md")}):
        text = page.read_text(encoding="utf-8")
        current = with_tables(text) if page.suffix == ".md" else text
        if (current := pins.with_pins(current) if page in pinned else current) == text:
            continue
        if "--check" in sys.argv[1:]:
            print(f"{page.relative_to(ROOT)}: a table or a pin differs. Run: make format", file=sys.stderr)
            stale = 1
        else:
            page.write_text(current, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())

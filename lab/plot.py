"""Draws docs/results/quality*.png and writes the tables of docs/results/quality_*.md from docs/results/quality*.json.

python -m lab.plot
"""

import argparse
import json
import textwrap
from pathlib import Path

from lab.lab_checkpoint import ROOT
from lab.lab_tasks import OCR_TASKS

DOCS = ROOT / "docs" / "results"
MARKS = ("<!-- tables: written by lab/plot.py -->", "<!-- /tables -->")
# Result, page of its tables, picture, the only bound that is shown; what is missing is left out.
STUDIES = (
    ("quality", "quality_digits", "quality", None),
    ("quality_documents", "quality_documents", "quality_documents", None),
    ("quality_documents_small_reduced", "quality_documents_small", None, 1.05),
)
DRAWN = {
    "gate": ("C3", "o-"),
    "entropy_gate": ("C6", "h-"),
    "paper": ("C0", "s-"),
    "cai": ("C7", "v--"),
    "cai expanded": ("C1", "^--"),
    "cai image-first": ("C4", "D--"),
    "cai device": ("C2", "P--"),
    "visual top-k": ("C5", "x:"),
    "skipping": ("C8", "+:"),
    "gate x redundancy": ("C9", "d-"),
    "random": ("0.6", "*:"),
}


def rows_of(result: dict, part: str = "main", bound: float | None = None) -> list[dict]:
    """Rows of a part at one bound, the unclipped model left out."""
    return [r for r in result[part]["rows"] if r["bound"] is not None and (bound is None or r["bound"] == bound)]


def draw(result: dict, path: Path) -> None:
    """What is kept, and the divergence of the answers, against the bound on the fullest rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (kept, far) = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    for name, (colour, style) in DRAWN.items():
        rows = [r for part in ("stress", "main") if part in result for r in rows_of(result, part)]
        rows = sorted((r for r in rows if r["method"] == name), key=lambda r: r["bound"])
        if not rows:
            continue
        x = [r["bound"] for r in rows]
        middle, low, high = zip(*([100 * v for v in r["kept"]] for r in rows), strict=True)
        kept.plot(x, middle, style, color=colour, label=name, markersize=5)
        kept.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        far.plot(x, [max(r["kl"], 1e-7) for r in rows], style, color=colour, label=name, markersize=5)
    kept.axhline(99.7, color="black", linewidth=0.8, linestyle=":")
    kept.set_ylabel("unclipped accuracy kept, % (mean over tasks)")
    far.set_ylabel("KL of the answers' tokens, nats")
    far.set_yscale("log")
    for axis in (kept, far):
        axis.set_xlabel("rows of the fullest rank / mean of the ranks")
        axis.grid(alpha=0.25)
    kept.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def with_interval(values: list[float]) -> str:
    return f"{percent(values[0])} ({percent(values[1])} to {percent(values[2])})"


def table(rows: list[dict], ocr: list[str]) -> str:
    """Methods at one bound, best first."""
    names = ["method", "kept, % (95 % interval)", "more than the default, points", "OCR, %", "clipped / dropped, %"]
    names += ["KL", "KL over the default's", "layer error", "fullest rank, worst"]
    cells = [_cells(r, ocr) for r in sorted(rows, key=lambda r: -r["kept"][0])]
    given = [i for i in range(len(names)) if any(row[i] for row in cells)]  # older results have fewer figures
    lines = [[names[i] for i in given], ["---"] * len(given), *([row[i] for i in given] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(r: dict, ocr: list[str]) -> list[str]:
    """What `table` says of a method."""
    return [
        f"`{r['method']}`",
        with_interval(r["kept"]),
        with_interval(r["kept_more_than_default"]) if "kept_more_than_default" in r else "",
        percent(sum(r["accuracy"][t][0] for t in ocr) / len(ocr)),
        f"{percent(r['share']['clipped'])} / {percent(r['share']['dropped'])}",
        f"{r['kl']:.1e}",
        "{:.2f} ({:.2f} to {:.2f})".format(*r["kl_over_default"]) if "kl_over_default" in r else "",
        "" if r["layer_error"] is None else f"{r['layer_error']:.3f}",
        f"{r['max_rank_rows_after']['worst']:.3f}",
    ]


def task_table(rows: list[dict], unclipped: dict, ocr: list[str]) -> str:
    """Accuracy by task, OCR last."""
    tasks = sorted(unclipped["accuracy"], key=lambda t: (t in ocr, t))
    lines = ["| method | " + " | ".join(tasks) + " |", "| --- |" + " --- |" * len(tasks)]
    for r in [unclipped, *sorted(rows, key=lambda r: -r["kept"][0])]:
        lines.append(f"| `{r['method']}` | " + " | ".join(percent(r["accuracy"][t][0]) for t in tasks) + " |")
    return "\n".join(lines)


def sweep_table(rows: list[dict]) -> str:
    lines = ["| option | kept, % | KL | clipped, % |", "| --- | --- | --- | --- |"]
    for r in sorted(rows, key=lambda r: r["method"]):
        lines.append(
            f"| `{r['method']}` | {with_interval(r['kept'])} | {r['kl']:.1e} | {percent(r['share']['clipped'])} |"
        )
    return "\n".join(lines)


def prose(text: str) -> str:
    """Lines of at most 160 characters, as the pages have them."""
    return textwrap.fill(text, 160, break_long_words=False, break_on_hyphens=False)


def summary(result: dict) -> str:
    """What the tables below it are of."""
    main = result["main"]
    unclipped = next(r for r in main["rows"] if r["bound"] is None)
    fullest = unclipped["max_rank_rows_after"]
    return (
        f"{main['batches']} batches, {main['requests']} requests, {result['device']}, {result['dtype']}; unclipped: "
        f"fullest rank {fullest['mean']:.2f} times the mean (a batch's worst layer, mean over batches), at most "
        f"{fullest['worst']:.2f}. Tasks that count: {', '.join(main['mastered'])}."
    )


PARTS = {
    "stress": "Below the mean",
    "ep16": "16 ranks",
    "ep32": "32 ranks",
    "replicas": "Copies first",
    "sweeps": "Sweeps",
    "importance": "Other importances",
}


def differing(rows: list[dict]) -> str:
    """The methods that differ from the default by more than the interval: in what they keep, and in KL."""
    more, less = _beyond(rows, "kept_more_than_default", 0.0)
    said = f"Beyond the interval more than the default keep: {more}; less: {less}."
    if any("kl_over_default" in r for r in rows):
        higher, lower = _beyond(rows, "kl_over_default", 1.0)
        said += f" Beyond the interval lower KL than the default have: {lower}; higher: {higher}."
    return said


def _beyond(rows: list[dict], figure: str, equal: float) -> tuple[str, str]:
    """Methods whose interval of `figure` lies above `equal`, and below it."""
    above, below = [], []
    for r in rows:
        _, low, high = r.get(figure, (equal, equal, equal))
        if low > equal or high < equal:
            (above if low > equal else below).append(f"`{r['method']}`")
    return ", ".join(above) or "none", ", ".join(below) or "none"


def entropy_table(found: dict) -> str:
    """Visual tokens by fifths of their entropy."""
    lines = ["| fifth of the visual tokens | lowest entropy | 2 | 3 | 4 | highest |", "| --- |" + " --- |" * 5]
    for name, row in found["measures"].items():
        lines.append(f"| {name} | " + " | ".join(f"{x:.3g}" for x in row) + " |")
    lines.append("| KL without its routed experts | " + " | ".join(f"{x:.1e}" for x in found["kl"]["entropy"]) + " |")
    lines.append("| right answers kept, % | " + " | ".join(percent(x) for x in found["kept"]["entropy"]) + " |")
    chance = f"{found['kl']['chance'][0]:.1e}, {percent(found['kept']['chance'][0])} % kept"
    return "\n".join(lines) + f"\n\n{found['cases']} batches; a fifth by chance: KL {chance}."


def tables(result: dict, only: float | None) -> str:
    """Everything between the marks of a page; at all bounds, or at the one."""

    def bounds_of(part: str) -> list[float]:
        found = sorted({r["bound"] for r in rows_of(result, part)}) if part in result else []
        return [bound for bound in found if only in (None, bound)]

    found, ocr = [prose(summary(result))], list(result.get("ocr", OCR_TASKS))
    unclipped = next(r for r in result["main"]["rows"] if r["bound"] is None)
    for bound in bounds_of("main"):
        rows = rows_of(result, bound=bound)
        found.append(f"## Bound {bound:g}\n\n{table(rows, ocr)}\n\n{prose(differing(rows))}")
    found.append(f"## By task, bound 1.05\n\n{task_table(rows_of(result, bound=1.05), unclipped, ocr)}")
    for part, title in PARTS.items():
        for bound in bounds_of(part):
            rows = rows_of(result, part, bound)
            head = (
                f"## {title}, bound {bound:g} ({result[part]['batches']} batches, {result[part]['requests']} requests)"
            )
            found.append(f"{head}\n\n{sweep_table(rows) if part == 'sweeps' else table(rows, ocr)}")
    if "entropy" in result:
        found.append(f"## What high-entropy tokens carry\n\n{entropy_table(result['entropy'])}")
    return "\n\n".join(found)


def write_tables(text: str, path: Path) -> None:
    """Replaces what stands between the marks of `path`."""
    page = path.read_text()
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name, page, picture, only in STUDIES:
        file = DOCS / f"{name}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text())
        write_tables(tables(result, only), DOCS / f"{page}.md")
        if picture:
            draw(result, DOCS / f"{picture}.png")


if __name__ == "__main__":
    main()

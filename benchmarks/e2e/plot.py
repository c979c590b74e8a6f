"""Draws a result file of prefill.py: ratio to stock SGLang by tokens a rank and pass, a line for each variant.

python3 -m benchmarks.e2e.plot docs/results/e2e_prefill_h200x2.json docs/results/end_to_end.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLORS = {"stock": "black", "off": "#9aa3ad", "inf": "#c9a45c", "rank-1.05": "#2f7d5b", "balanced": "#7da6c7"}
LINES = {"deepep": "dotted", "bounded": "solid"}
NAMES = {"balanced": "perfectly balanced (ideal)"}


def lines(rows: list[dict], skew: float) -> dict[tuple[str, str], list[dict]]:
    """Rows of one skew by (variant, dispatch), by rising tokens. Stock, which is 1 everywhere, is not among them."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["case"]["tokens"]):
        case = row["case"]
        if case["skew"] == skew and case["variant"] != "stock":
            found.setdefault((case["variant"], case["dispatch"]), []).append(row)
    return found


def draw(axes: Axes, rows: list[dict], skew: float) -> None:
    """One panel."""
    for (variant, dispatch), points in lines(rows, skew).items():
        tokens, ratios = ([p["case"]["tokens"] for p in points], [p["ratio"] for p in points])
        color = COLORS.get(variant)
        label = f"{NAMES.get(variant, variant)}, {dispatch}"
        axes.plot(tokens, ratios, marker="o", ms=3, color=color, ls=LINES.get(dispatch, "dashed"), label=label)
        for point in points:
            if point["ci95"]:
                axes.vlines(point["case"]["tokens"], *point["ci95"], color=color, lw=2, alpha=0.4)
    axes.axhline(1, color=COLORS["stock"], lw=1, label="SGLang without the plugin")
    tokens = sorted({row["case"]["tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens a rank and pass")
    axes.set_title("uniform routing" if skew == 1 else f"max/mean {skew}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    found = json.loads(source.read_text())
    skews = sorted({row["case"]["skew"] for row in found["rows"]}, reverse=True)
    figure, panels = plt.subplots(
        1, len(skews), figsize=(5.5 * len(skews), 4), sharey=True, layout="constrained", squeeze=False
    )
    for axes, skew in zip(panels[0], skews, strict=True):
        draw(axes, found["rows"], skew)
    panels[0][0].set_ylabel("time of a pass, stock SGLang = 1")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    case = found["rows"][0]["case"]
    figure.suptitle(f"{found['gpu']}, {case['layers']} layers, {case['dtype']}, {case['prompts']} prompts", fontsize=9)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()

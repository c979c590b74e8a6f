"""Draws docs/results/straggler.png from docs/results/straggler_h200.json: the slowest rank's expert
stage, beside the ideal.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
STYLES = {"unclipped": "#9aa3ad", "paper": "#c9a45c", "cai": "#7da6c7", "rank": "#2f7d5b"}
LABELS = {"unclipped": "unclipped", "paper": "paper (entropy-weighted)", "cai": "cai (drops)", "rank": "rank (default)"}
TOKENS, GAMMA = 3840, 1.05


def main() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "straggler_h200.json").read_text())["rows"]
    kept = [r for r in rows if r["case"]["tokens_per_rank"] == TOKENS and r["case"].get("gamma", GAMMA) == GAMMA]
    routings = list(dict.fromkeys(r["case"]["routing"] for r in kept))
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, (method, color) in enumerate(STYLES.items()):
        chosen = [r for r in kept if r["case"]["method"] == method]
        places = [x + (i - 1.5) * 0.2 for x in range(len(routings))]
        heights = [max(r["alone_us"]) / 1000 for r in chosen]
        axes.bar(places, heights, 0.18, color=color, label=LABELS[method])
        for place, row in zip(places, chosen, strict=True):
            dropped = row["assignments"]["dropped"] / (TOKENS * 8 * 8)
            if dropped > 0.005:
                height = max(row["alone_us"]) / 1000
                axes.text(place, height + 0.06, f"-{dropped:.0%}", ha="center", va="bottom", fontsize=8, color=color)
    for x, routing in enumerate(routings):
        before, after = (next(r for r in kept if _is(r, routing, m)) for m in ("unclipped", "rank"))
        ideal = max(before["alone_us"]) / 1000 / after["ideal"]
        axes.hlines(
            ideal, x - 0.42, x + 0.42, colors="black", linestyles="dashed", linewidth=1, label="" if x else "ideal"
        )
    axes.set_xticks(range(len(routings)), [r if r.startswith("layer") else f"max/mean {r}" for r in routings])
    axes.set_ylabel("expert stage of the slowest rank, ms")
    axes.set_title(f"{TOKENS} tokens per rank, 8 ranks, gamma {GAMMA}; -n %: assignments dropped", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(ROOT / "docs" / "results" / "straggler.png", dpi=130)


def _is(row: dict, routing: str, method: str) -> bool:
    return row["case"]["routing"] == routing and row["case"]["method"] == method


if __name__ == "__main__":
    main()

"""Draws docs/results/fused.png from docs/results/fused_h200*.json: dispatch and combine on one, two and four GPUs,
DeepEP's and the fused ones with the plan inside, nothing to clip and a fifth clipped.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
FILES = {1: "fused_h200", 2: "fused_h200x2", 4: "fused_h200x4"}  # by GPUs
HIDDEN, DTYPE = 7168, "fp8"
# By label: (operation, importance, clipped) of dispatch and of combine, and a color. `gate` is the presets' importance;
# combine does not depend on it, and was timed once.
BARS = {
    "DeepEP, no plan": (("deepep_dispatch", None, 0.0), ("deepep_combine", None, 0.0), "#9aa3ad"),
    "plan, DeepEP": (("plan_deepep_dispatch", "entropy_gate", 0.0), ("deepep_combine", None, 0.0), "#c9a45c"),
    "fused, with the plan": (("fused_dispatch", "gate", 0.0), ("fused_combine", "entropy_gate", 0.0), "#7fb797"),
    "fused, 20 % clipped": (("fused_dispatch", "gate", 0.2), ("fused_combine", "entropy_gate", 0.2), "#2f7d5b"),
}


def times(gpus: int) -> dict[int, dict[str, tuple[float, float]]]:
    """Microseconds of dispatch and combine for every bar, by tokens per rank."""
    rows = json.loads((ROOT / "docs" / "results" / f"{FILES[gpus]}.json").read_text())["rows"]
    found: dict[int, dict[tuple, float]] = {}
    for row in rows:
        case = row["case"]
        if (case["H"], case["dtype"], case["R"]) == (HIDDEN, DTYPE, gpus):
            key = row["op"], case.get("importance"), case["clipped"]
            found.setdefault(case["T"], {})[key] = row["median_us"]
    return {
        tokens: {label: (of[dispatch], of[combine]) for label, (dispatch, combine, _) in BARS.items()}
        for tokens, of in found.items()
    }


def main() -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    every = {gpus: sorted(times(gpus).items()) for gpus in FILES}
    for panel, axes in enumerate(panels):
        for i, (label, (*_, color)) in enumerate(BARS.items()):
            places = [x + (i - 1.5) * 0.2 for x in range(len(FILES))]
            parts = [of_gpus[panel][1][label] for of_gpus in every.values()]
            axes.bar(places, [d for d, _ in parts], 0.18, color=color, label=label)
            axes.bar(places, [c for _, c in parts], 0.18, [d for d, _ in parts], color=color, alpha=0.55)
            for place, (dispatch, combine) in zip(places, parts, strict=True):
                axes.text(place, dispatch + combine, f"{dispatch + combine:.0f}", ha="center", va="bottom", fontsize=7)
        tokens = sorted({of_gpus[panel][0] for of_gpus in every.values()})
        axes.set_xticks(range(len(FILES)), [f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in FILES])
        axes.set_title(f"{' to '.join(map(str, dict.fromkeys((tokens[0], tokens[-1]))))} tokens per rank", fontsize=10)
        axes.set_ylabel("us: dispatch, and paler combine")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"H200, hidden size {HIDDEN}, {DTYPE.upper()} rows, 128 experts, top-8, skewed", fontsize=10)
    figure.savefig(ROOT / "docs" / "results" / "fused.png", dpi=130)


if __name__ == "__main__":
    main()

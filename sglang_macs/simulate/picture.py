"""The study as a picture: speed-up over what is clipped, one panel per EP size."""

from ..errors import MacsError
from .study import Row

COLOURS = {"cai": "C1", "paper": "C2", "rank": "C0"}


def draw(rows: list[Row], title: str, path: str) -> None:
    """Writes a PNG. Raises MacsError if matplotlib is missing, or the file cannot be written."""
    try:
        import matplotlib
    except ImportError as error:
        raise MacsError("--plot", "no matplotlib", "it installed", "pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({r.ep for r in rows})
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(3.1 * len(sizes) + 0.6, 3.9), sharey=True, constrained_layout=True, squeeze=False
    )
    for axis, ep in zip(axes[0], sizes, strict=True):
        _panel(axis, [r for r in rows if r.ep == ep])
    axes[0][0].set_ylabel("forward pass: speed-up over off")
    axes[0][len(sizes) // 2].set_xlabel("assignments clipped, % (open markers: dropped)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title, fontsize=11)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise MacsError("--plot", f"{path} ({error.strerror})", "a file that can be written") from error
    finally:
        plt.close(figure)


def _panel(axis, rows: list[Row]) -> None:
    """One EP size. Solid: flat exchange; a thin bar up or down to the hierarchical one."""
    off = next(r for r in rows if r.preset == "off")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.axhline(off.balanced, color="grey", linestyle="--", linewidth=1, label="every rank at the mean")
    for preset, colour in COLOURS.items():
        flat = [r for r in rows if r.preset == preset and r.exchange == "flat"]
        deep = [r for r in rows if r.preset == preset and r.exchange == "hierarchical"]
        if not flat:
            continue
        x, y = [100 * r.clipped for r in flat], [r.speedup for r in flat]
        axis.plot(x, y, "o-", color=colour, label=preset, markersize=4)
        axis.plot([100 * r.dropped for r in flat], y, "o", color=colour, fillstyle="none", markersize=5)
        axis.vlines(x, y, [r.speedup for r in deep], color=colour, linewidth=2.5, alpha=0.4)
        for i in (0, -1):  # the ends say which way gamma runs
            axis.annotate(f"{flat[i].gamma:g}", (x[i], y[i]), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axis.set_title(f"EP{off.ep}: max/mean {off.max_over_mean_before:.2f}", fontsize=10)
    axis.grid(alpha=0.25)

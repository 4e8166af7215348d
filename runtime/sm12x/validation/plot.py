"""The plot of a benchmark: time against tokens, one panel for each shape, the floor as a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Colours that stay apart in print and for colour-blind readers.
_LINES = {
    "sm12x": ("sm12x", "#0072b2", "o-"),
    "torch": ("torch._scaled_grouped_mm", "#d55e00", "s--"),
    "triton": ("Triton", "#009e73", "^--"),
}


def plot_rows(result: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG of `result["rows"]`. Raises ImportError where matplotlib is missing, ValueError without
    rows.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"matplotlib is needed for --plot: pip install matplotlib ({error})") from error
    rows: list[dict[str, Any]] = list(result["rows"])
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    panels = list(dict.fromkeys((row["model"], row["gemm"]) for row in rows))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.3 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False)
    for index, panel in enumerate(panels):
        axes = grid[index // columns][index % columns]
        mine = sorted((row for row in rows if (row["model"], row["gemm"]) == panel), key=lambda row: row["T"])
        _panel(axes, mine)
    for index in range(len(panels), lines * columns):
        grid[index // columns][index % columns].set_axis_off()
    figure.suptitle(f"FP8 grouped GEMM, {result['device']}, {result['date']}", fontsize=11)
    figure.savefig(path, dpi=150)


def _panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    tokens = [row["T"] for row in rows]
    for name, (label, colour, style) in _LINES.items():
        points = [(row["T"], row["times"][name]) for row in rows if name in row["times"]]
        if points:
            axes.errorbar(
                [t for t, _ in points],
                [entry["median_us"] for _, entry in points],
                yerr=[entry["iqr_us"] / 2 for _, entry in points],
                fmt=style,
                color=colour,
                label=label,
                markersize=4,
                linewidth=1.2,
            )
    floors = [(row["T"], row["floor_us"]) for row in rows if row["floor_us"]]
    if floors:
        kind = "read floor" if rows[0]["floor"] == "read" else "counted floor"
        axes.plot([t for t, _ in floors], [us for _, us in floors], color="black", linewidth=1, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.set_xticks(tokens, [str(t) for t in tokens])
    shape = f"E {rows[0]['experts']}, K {rows[0]['K']}, N {rows[0]['N']}"
    axes.set_title(f"{rows[0]['model']} {rows[0]['gemm']} ({shape})", fontsize=9)
    axes.set_xlabel("tokens T")
    axes.set_ylabel("µs per call")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=7)

"""Draws the figures with matplotlib and writes them as PNG and SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridgelm.reports.plots import GREY, PALETTE, Panel

LEGEND = 6  # names that a panel's own legend can hold; more go below the figure


def draw_files(panels: Sequence[Panel], path: Path, columns: int = 3) -> list[Path]:
    """The panels as one figure, `path`.png and `path`.svg."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    style = {"svg.fonttype": "none", "svg.hashsalt": path.name, "font.size": 9, "axes.spines.top": False,
             "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "axes.titlelocation": "left"}
    with mpl.rc_context(style):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(4.3 * columns, 3.0 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, i + 1)
            _draw(axes, panel)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, panel=panel: panel.x_format(value)))
            if not panel.log:
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, panel=panel: panel.y_format(value)))
        _legends(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [path.with_name(path.name + ending) for ending in (".png", ".svg")]
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def _draw(axes: Any, panel: Panel) -> None:  # of matplotlib, which is not imported up here
    axes.set_title(panel.title, fontsize=10, fontweight="bold")
    axes.set_xlabel(panel.xlabel)
    for mark, meaning in panel.marks:
        axes.axhline(mark, color="#777777", linewidth=0.8, linestyle=":")
        axes.annotate(meaning, (0.01, mark), xycoords=("axes fraction", "data"), fontsize=7, color="#555555",
                      va="bottom")
    for cut in panel.cuts:
        axes.axvline(cut, color="#777777", linewidth=0.8, linestyle=":")
    grey = sum(series.colour == GREY for series in panel.series)
    for order, series in enumerate(panel.series):
        if series.colour == GREY:
            said = {"label": f"{grey} others"} if grey else {}
            grey = 0  # said once
            axes.plot(series.xs, series.ys, color="#c8c8c8", linewidth=0.8, zorder=1.5,
                      marker="" if len(series.xs) > 1 else "o", markersize=3, **said)
            continue
        colour = PALETTE[series.colour % len(PALETTE)]
        dash = (None, (5, 2), (1.5, 2))[series.colour // len(PALETTE) % 3]
        if series.low is not None and series.high is not None:
            axes.fill_between(series.xs, series.low, series.high, color=colour, alpha=0.15, linewidth=0)
        style = {"color": colour, "zorder": max(2.5, 20 - order), "linewidth": 2.2 if series.strong else 1.4}
        label = series.label.replace("$", r"\$") or None
        axes.plot(series.xs, series.ys, linestyle="-" if series.line else "none", marker="" if series.line else "o",
                  markersize=3, label=label, **({"dashes": dash} if dash and series.line else {}), **style)
        if series.hollow is not None:
            for hollow in (True, False):
                points = [(a, b) for a, b, h in zip(series.xs, series.ys, series.hollow) if h == hollow]
                axes.scatter([a for a, _ in points], [b for _, b in points], s=9, zorder=30, linewidth=0.8,
                             edgecolor=colour, facecolor="white" if hollow else colour)
    if panel.log:
        axes.set_yscale("log")
    if panel.floor is not None:
        axes.set_ylim(bottom=min(axes.get_ylim()[0], panel.floor))


def _legends(figure: Any) -> None:
    """One in each panel, or below the figure if a panel has too many names for that."""
    named = {axes: dict(zip(*axes.get_legend_handles_labels()[::-1])) for axes in figure.axes}
    if max(map(len, named.values())) > LEGEND:
        every = {label: handle for found in named.values() for label, handle in found.items()}
        figure.legend(every.values(), every.keys(), loc="outside lower center", ncols=min(6, len(every)), fontsize=8,
                      frameon=False)
        return
    for axes, found in named.items():
        if len(found) > 1:
            axes.legend(fontsize=7, frameon=False)

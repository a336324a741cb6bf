"""report.png: how the run went, in one picture that a README can show; the page's first charts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.log.units import amount, duration, scientific
from megagpt.report.charts import Chart, charts
from megagpt.report.look import ALARM, FAINT, GREY, GRID, INK
from megagpt.report.series import Run

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#c3cad2",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "figure.facecolor": "white",
    # Texts in a picture are as small as they look: no font file is needed beyond matplotlib's.
    "font.family": "DejaVu Sans",
}
_PANELS = (
    ("loss", (0, slice(0, 6))),
    ("loss over compute", (1, slice(0, 3))),
    ("gradient norm, before clipping", (1, slice(3, 6))),
    ("learning rate", (2, slice(0, 2))),
    ("batch size", (2, slice(2, 4))),
    ("throughput", (2, slice(4, 6))),
)
"""(title of a chart, its place in the grid of 3 rows and 6 columns)."""
_LINES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.8},
    "step": {"linewidth": 1.8, "drawstyle": "steps-pre"},
    "faint": {"linewidth": 0.8, "alpha": 0.25},
    "dash": {"linewidth": 1.4, "linestyle": (0, (5, 3))},
    "dots": {
        "linewidth": 1.6,
        "marker": "o",
        "markersize": 4.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
        "zorder": 5,
        "clip_on": False,
    },
}
"""How each kind of a chart's lines is drawn."""


def draw_runs(runs: Sequence[Run], path: Path) -> Path:
    """Loss above; compute, gradients, learning rate, batch and throughput below. Returns `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {chart["title"]: chart for chart in charts(runs)}
    with pyplot.rc_context(_STYLE):
        figure = pyplot.figure(figsize=(10, 9.2), dpi=150)
        grid = figure.add_gridspec(3, 6, height_ratios=(2.1, 1.5, 1), hspace=0.4, wspace=1.1)
        figure.subplots_adjust(left=0.07, right=0.975, top=0.89, bottom=0.055)
        for title, (row, columns) in _PANELS:
            if title in found:
                _panel(figure.add_subplot(grid[row, columns]), found[title], len(runs))
        title, facts = f"{len(runs)} runs", "light: training loss, dots: validation loss"
        if len(runs) == 1:
            title, facts = runs[0].name, _facts_line(runs[0])
        figure.text(0.07, 0.96, title, fontsize=15, fontweight="bold")
        figure.text(0.07, 0.932, facts, fontsize=10, color=FAINT)
        figure.savefig(path, metadata={"Software": None})
        pyplot.close(figure)
    return path


def _facts_line(run: Run) -> str:
    parts = []
    if run.parameters:
        parts.append(f"{amount(run.parameters[0])} parameters")
    parts.append(f"{amount(run.tokens[-1])} tokens in {amount(len(run.steps))} steps")
    if run.wall_s:
        parts.append(duration(run.wall_s))
    for key, unit in (("tokens_per_s", "{} tokens/s"), ("mfu", "MFU {}%")):
        values = run.column(key)
        if np.isfinite(values).any():
            median = float(np.nanmedian(values))
            parts.append(unit.format(f"{100 * median:.1f}" if key == "mfu" else amount(median)))
    for cause in ("restart", "rollback"):
        n = sum(event["cause"] == cause for event in run.restarts)
        if n:
            parts.append(f"{n} {cause}{'s' if n > 1 else ''}")
    return "   \N{MIDDLE DOT}   ".join(parts)


def _panel(axes: Any, chart: Chart, n_runs: int) -> None:
    """Draws a chart of the page."""
    large = chart["title"] == "loss"
    for line in chart["lines"]:
        x, y = line["x"], line["y"]
        if line["kind"] == "step":
            # A step's value was in force from the end of the step before, the first one's from 0.
            x, y = [0.0, *x], [y[0], *y]
        label = line["name"]
        if line["kind"] == "faint":
            label = "_"
        elif large:
            label += f"  {y[-1]:.3f}"
        axes.plot(x, y, color=line["colour"], label=label, **_LINES[line["kind"]])
    _marks(axes, chart)
    _scales(axes, chart)
    unit = f" ({chart['unit']})" if chart["unit"] else ""
    axes.set_title(chart["title"] + unit)
    axes.set_xlabel(chart["x"], loc="right", fontsize=9)
    if large or (chart["title"] == "loss over compute" and n_runs < 4):
        axes.legend(loc="upper right" if large else "best", fontsize=10 if large else 8)


def _marks(axes: Any, chart: Chart) -> None:
    """Vertical lines, with each kind once in the legend."""
    named: set[str] = set()
    for mark in chart["marks"]:
        kind = mark["kind"]
        axes.axvline(
            mark["x"],
            color=ALARM if kind == "spike" else GREY,
            linewidth=1,
            linestyle=(0, (3, 3)),
            label="_" if kind in named else kind,
            zorder=1,
        )
        named.add(kind)


def _scales(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    number = scientific if chart["title"] == "learning rate" else _number
    for axis, log, text in (
        (axes.xaxis, chart["xlog"], amount if chart["x"] == "tokens" else _number),
        (axes.yaxis, chart["ylog"], number),
    ):
        values = _values(chart, "x" if axis is axes.xaxis else "y", log)
        if log:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        locator: Any = MaxNLocator(
            nbins=7 if chart["title"] == "loss" else 5, steps=[1, 2, 2.5, 5, 10]
        )
        if log and len(values) and values.max() > 8 * values.min():
            few = values.max() < 100 * values.min()
            locator = LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=6)
        axis.set_major_locator(locator)
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text(value)))
    y = _values(chart, "y", chart["ylog"])
    if len(y) and chart["ylog"]:
        axes.set_ylim(y.min() * 0.95, np.quantile(y, 0.999) * 1.06)
    elif len(y):
        axes.set_ylim(bottom=0)
    if not chart["xlog"]:
        axes.set_xlim(0, _values(chart, "x", False).max() * 1.01)


def _values(chart: Chart, axis: str, log: bool) -> Any:
    values = np.concatenate([np.asarray(line[axis], float) for line in chart["lines"]])
    return values[values > 0] if log else values


def _number(value: float) -> str:
    if not value or not math.isfinite(value):
        return "0"
    if abs(value) < 1e-3:
        return scientific(value)
    return amount(value) if abs(value) >= 1000 else f"{value:g}"

"""report.png: how the run went, in one picture that a README can show; the page's first charts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.errors import visible
from megagpt.files import whole_file
from megagpt.log.units import amount, amounts
from megagpt.report.charts import Chart, charts
from megagpt.report.series import Run
from megagpt.report.table import count, headline

STYLE = Path(__file__).with_name("picture.mplstyle")
FAINT = "#66727f"
_PANELS = (
    ("loss", (0, slice(0, 6))),
    ("loss over compute", (1, slice(0, 3))),
    ("gradient norm, before clipping", (1, slice(3, 6))),
    ("learning rate", (2, slice(0, 2))),
    ("batch size", (2, slice(2, 4))),
    ("throughput", (2, slice(4, 6))),
)
"""(title of a chart, its row and columns in a grid of 3 rows and 6 columns)."""
_DOTS = {"marker": "o", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.8}
_LINES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.8},
    "step": {"linewidth": 1.8, "drawstyle": "steps-pre"},
    "faint": {"linewidth": 0.8, "alpha": 0.25},
    "dash": {"linewidth": 1.4, "linestyle": (0, (5, 3))},
    "dots": {"linewidth": 1.6, "zorder": 5, "clip_on": False, **_DOTS},
}
"""How each kind of a chart's lines is drawn."""


def draw_runs(runs: Sequence[Run], path: Path) -> Path:
    """Loss above; compute, gradients, learning rate, batch and throughput below. Returns `path`."""
    # It would tell of the cache of fonts that it makes the first time.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib import style
    from matplotlib.figure import Figure

    by_title = {chart["title"]: chart for chart in charts(runs)}
    with style.context(STYLE):
        figure = Figure(figsize=(10, 9.2), dpi=150)
        grid = figure.add_gridspec(3, 6, height_ratios=(2.1, 1.5, 1), hspace=0.4, wspace=1.1)
        figure.subplots_adjust(left=0.07, right=0.975, top=0.89, bottom=0.055)
        for title, (row, columns) in _PANELS:
            if title in by_title:
                _panel(figure.add_subplot(grid[row, columns]), by_title[title], len(runs))
        title, facts = f"{len(runs)} runs", "light: training loss, dots: validation loss"
        if by_title.get("loss", {}).get("marks"):
            facts += ", dashes: restarts, rollbacks and spikes"
        if len(runs) == 1:
            title, facts = runs[0].name, _facts_line(runs[0])
        figure.text(0.07, 0.96, plain_text(title), fontsize=15, fontweight="bold")
        figure.text(0.07, 0.932, facts, fontsize=9, color=FAINT)
        with whole_file(path) as file:
            figure.savefig(file, metadata={"Software": None})
    return path


def plain_text(text: str) -> str:
    """A text as matplotlib draws it, in one line; a label that begins with "_" would be hidden."""
    text = visible(text).replace("\n", "\\n").replace("\t", "\\t")
    return f" {text}" if text.startswith("_") else text


def _facts_line(run: Run) -> str:
    parts = [f"{value} {name.partition(' (')[0]}" for name, value in headline(run)]
    for cause in ("restart", "rollback"):
        if n := count(run, cause):
            parts.append(f"{n} {cause}{'s' if n > 1 else ''}")
    return "  \N{MIDDLE DOT}  ".join(parts)


def _panel(axes: Any, chart: Chart, n_runs: int) -> None:
    """Draws a chart of the page."""
    large = chart["title"] == "loss"
    for line in chart["lines"]:
        x, y = line["x"], line["y"]
        if line["kind"] == "step":
            # A step's value was in force from the end of the step before, the first one's from 0.
            x, y = [0.0, *x], [y[0], *y]
        last = f"  {y[-1]:.3f}" if large else ""
        label = "_" if line["kind"] == "faint" else plain_text(line["name"] + last)
        style = _LINES[line["kind"]]
        if over := line["over"]:
            style = {**style, "linestyle": (0, (4 / over, 8 - 4 / over))}
        axes.plot(x, y, color=line["colour"], label=label, **style)
    named: set[str] = set()
    for mark in chart["marks"]:
        kind = mark["kind"]
        # Of several runs each has marks of its own colour, which a key in one would belie.
        label = "_" if kind in named or n_runs > 1 else kind
        axes.axvline(
            mark["x"], color=mark["colour"], linewidth=1, linestyle=(0, (3, 3)), label=label
        )
        named.add(kind)
    _scale(axes, axes.xaxis, chart, "x")
    _scale(axes, axes.yaxis, chart, "y")
    axes.set_title(plain_text(chart["title"]) + (f" ({chart['unit']})" if chart["unit"] else ""))
    axes.set_xlabel(chart["x"], loc="right", fontsize=9)
    if large or (chart["title"] == "loss over compute" and n_runs < 4):
        axes.legend(loc="upper right" if large else "best", fontsize=10 if large else 8)


def _scale(axes: Any, axis: Any, chart: Chart, name: str) -> None:
    """The range and the ticks of one axis, "x" or "y"."""
    from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator

    class Amounts(Formatter):
        def __call__(self, value: float, position: object = None) -> str:
            return amount(value, 4)

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return amounts(values)

    values = np.concatenate([np.asarray(line[name], float) for line in chart["lines"]])
    log = chart[f"{name}log"]
    locator: Any = MaxNLocator(nbins=7 if chart["title"] == "loss" else 5, steps=[1, 2, 2.5, 5, 10])
    if log:
        values = values[values > 0]
        axes.set(**{f"{name}scale": "log"})
        if values.max() > 8 * values.min():
            few = values.max() < 100 * values.min()
            locator = LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=6)
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(Amounts())
    if name == "y" and not log:
        axes.set_ylim(bottom=min(0.0, values.min()))
    elif name == "y":
        # Faint lines, single steps, may leap out at the top.
        steady = [max(line[name]) for line in chart["lines"] if line["kind"] != "faint"]
        axes.set_ylim(values.min() * 0.95, max(steady) * 1.06)
    elif name == "x" and not log:
        axes.set_xlim(0, values.max() * 1.01)

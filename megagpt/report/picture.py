"""report.png: how the run went, in one picture that a README can show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.log.series import Floats, Run, smooth, thin
from megagpt.log.text import amount, duration, scientific

INK, FAINT, GRID = "#1f2933", "#66727f", "#e6e9ed"
TRAIN, VALIDATION, RATE, BATCH = "#2b6cb0", "#dd6b20", "#2f855a", "#6b46c1"
COLOURS = (TRAIN, VALIDATION, RATE, BATCH, "#c53030", "#0987a0", "#b7791f", "#4a5568")
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


def draw_runs(runs: Sequence[Run], path: Path) -> Path:
    """Loss above; learning rate and batch size below; all over tokens. Returns `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure = pyplot.figure(figsize=(10, 6.4), dpi=150)
        grid = figure.add_gridspec(2, 2, height_ratios=(2.1, 1), hspace=0.34, wspace=0.2)
        figure.subplots_adjust(left=0.07, right=0.975, top=0.85, bottom=0.075)
        loss = figure.add_subplot(grid[0, :])
        rate, batch = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
        if len(runs) == 1:
            _one_loss(loss, runs[0])
            _heading(figure, runs[0].name, _facts_line(runs[0]))
        else:
            _many_losses(loss, runs)
            _heading(figure, f"{len(runs)} runs", "light: training loss, dots: validation loss")
        _schedule(rate, batch, runs)
        for axes in (loss, rate, batch):
            _tokens_axis(axes, runs)
        figure.savefig(path, metadata={"Software": None})
        pyplot.close(figure)
    return path


def _heading(figure: Any, title: str, facts: str) -> None:
    figure.text(0.07, 0.95, title, fontsize=15, fontweight="bold")
    figure.text(0.07, 0.913, facts, fontsize=10, color=FAINT)


def _facts_line(run: Run) -> str:
    parts = []
    if run.parameters:
        parts.append(f"{amount(run.parameters[0])} parameters")
    parts.append(f"{amount(run.tokens[-1])} tokens in {amount(len(run.steps))} steps")
    if run.wall_s:
        parts.append(duration(run.wall_s))
    speeds = run.column("tokens_per_s")
    if np.isfinite(speeds).any():
        parts.append(f"{amount(float(np.nanmedian(speeds)))} tokens/s")
    if run.restarts:
        n = len(run.restarts)
        parts.append(f"{n} restart{'s' if n > 1 else ''}")
    return "   \N{MIDDLE DOT}   ".join(parts)


def window(run: Run) -> int:
    """Steps over which the curve of the training loss is averaged."""
    n_steps = len(run.steps)
    return min(100, max(5, n_steps // 60)) if n_steps >= 24 else 1


def _one_loss(axes: Any, run: Run) -> None:
    tokens, loss, mean = thin(
        run.tokens, run.column("loss"), smooth(run.column("loss"), window(run))
    )
    axes.plot(tokens, loss, color=TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, mean, color=TRAIN, linewidth=1.8, label=_named("training", mean))
    at, validation = run.validation
    if len(at):
        axes.plot(
            at,
            validation,
            color=VALIDATION,
            linewidth=1.6,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label=_named("validation", validation),
            zorder=5,
            clip_on=False,
        )
    for index, event in enumerate(run.restarts):
        axes.axvline(
            event["tokens"],
            color="#a0aec0",
            linewidth=1,
            linestyle=(0, (3, 3)),
            label=None if index else "restart",
            zorder=1,
        )
    _loss_axis(axes, [loss, validation])


def _many_losses(axes: Any, runs: Sequence[Run]) -> None:
    shown: list[Floats] = []
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        tokens, mean = thin(run.tokens, smooth(run.column("loss"), window(run)))
        axes.plot(tokens, mean, color=colour, linewidth=1.4, alpha=0.45)
        at, validation = run.validation
        last = validation if len(validation) else mean
        axes.plot(
            at, validation, color=colour, linewidth=1.8, marker="o", markersize=4,
            label=_named(run.name, last),
        )  # fmt: skip
        shown += [mean, validation]
    _loss_axis(axes, shown)


def _named(name: str, values: Floats) -> str:
    known = values[np.isfinite(values)]
    return f"{name}  {known[-1]:.3f}" if len(known) else name


def _loss_axis(axes: Any, shown: Sequence[Floats]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    values = np.concatenate([part[np.isfinite(part) & (part > 0)] for part in shown])
    axes.set_title("loss (nats per token)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if len(values):
        axes.set_ylim(values.min() * 0.95, np.quantile(values, 0.999) * 1.06)
    axes.legend(loc="upper right", fontsize=10)


def _schedule(rate: Any, batch: Any, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import FuncFormatter

    rate.set_title("learning rate")
    batch.set_title("batch size (tokens)")
    single = len(runs) == 1
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        tokens, lr, size = thin(run.tokens, run.column("lr"), run.column("batch_tokens"))
        rate.plot(tokens, lr, color=RATE if single else colour, linewidth=1.8)
        # A step's batch was in force from the end of the step before, the first one's from 0.
        tokens, size = np.insert(tokens, 0, 0.0), np.insert(size, 0, size[0])
        batch.step(tokens, size, where="pre", color=BATCH if single else colour, linewidth=1.8)
    rate.set_ylim(bottom=0)
    batch.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
    batch.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))


def _tokens_axis(axes: Any, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axes.set_xlim(0, max(float(run.tokens[-1]) for run in runs) * 1.01)
    axes.set_xlabel("tokens", loc="right", fontsize=9)

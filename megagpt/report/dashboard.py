"""The dashboard of `megagpt watch`: what it shows of a run, and what it warns about (L3)."""

import math
import shutil
from typing import Any

import numpy as np
import plotext
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megagpt.errors import visible
from megagpt.log.eta import Eta
from megagpt.log.units import amount, duration, scientific
from megagpt.report.series import Floats, Run
from megagpt.report.table import beside_rows, count

_QUIET_STEPS = 10
"""A run is quiet when nothing came for so many times its usual step time."""
_QUIET_S = 60.0
_RECENT = 100
"""Steps back to which alerts look."""


def binned(values: Floats, n: int) -> Floats:
    """The means of the finite values in at most n bins, NaN where a bin has none."""
    known = np.isfinite(values)
    starts = np.unique(np.arange(n) * len(values) // n)
    counts = np.add.reduceat(known.astype(float), starts)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    return np.divide(sums, counts, out=np.full(len(starts), math.nan), where=counts > 0)


def alerts(run: Run, now: float) -> list[str]:
    """What a person should look at, the worst first; `now` in seconds since 1970."""
    found = []
    recent = run.steps[-_RECENT:]
    last_s = run.step_s[-500:]
    usual_s = float(np.nanmedian(last_s)) if np.isfinite(last_s).any() else 0.0
    quiet_s = now - max(line.get("time", now) for line in recent)
    if not finished(run) and quiet_s > max(_QUIET_S, _QUIET_STEPS * usual_s):
        found.append(f"no step for {duration(quiet_s)}; a step takes {usual_s:.2g} s")
    leaps = [spike for spike in run.spikes if spike["step"] >= recent[0]["step"]]
    found += [f"spike at step {spike['step']}: {spike['reason']}" for spike in leaps[-3:]]
    skipped = [step.get("skipped_steps", 0) for step in recent]
    if skipped[-1] > skipped[0]:
        found.append(f"{skipped[-1] - skipped[0]} of the last {len(recent)} steps were skipped")
    if not finished(run) and (slow := _slow(run)):
        found.append(slow)
    if overdue := _overdue(run):
        found.append(f"no checkpoint for {amount(overdue)} tokens")
    disk = shutil.disk_usage(run.folder)
    if disk.free < 0.05 * disk.total:
        found.append(f"{amount(disk.free)} bytes left on the disk of the run folder")
    return found


def _slow(run: Run) -> str:
    """Whether the last steps are slower than earlier ones of the same batch size."""
    speed, batch = run.column("tokens_per_s")[-1000:], run.column("batch_tokens")[-1000:]
    same = speed[batch == batch[-1]]
    if len(same) < 60 or not np.isfinite(same).all():
        return ""
    usual, last = float(np.median(same[:-20])), float(np.median(same[-20:]))
    if last >= 0.8 * usual:
        return ""
    return f"throughput is {100 * (1 - last / usual):.0f}% below usual at this batch size"


def _overdue(run: Run) -> float:
    """Tokens since the last checkpoint when that is more than two intervals, else 0."""
    every = run.config.checkpoint.every_tokens if run.config else 0
    saved = [event["tokens"] for event in run.events if event["event"] in ("checkpoint", "resume")]
    since = float(run.tokens[-1]) - max(saved, default=0)
    return since if every and since > 2 * every else 0.0


def finished(run: Run) -> bool:
    """Whether all tokens of the run's schedule are consumed."""
    return run.config is not None and bool(run.tokens[-1] >= run.config.schedule.total_tokens)


def seconds_left(run: Run) -> float | None:
    """Estimate of the time to the end, the ramp included; None without a configuration."""
    if run.config is None:
        return None
    schedule = run.config.schedule
    eta = Eta(schedule.end_tokens, schedule.batch)
    for step, step_s in zip(run.steps[-2000:], run.step_s[-2000:].tolist(), strict=True):
        if math.isfinite(step_s) and step.get("batch_tokens"):
            eta.observe(step["batch_tokens"], step_s)
    return eta.seconds(int(run.tokens[-1]))


def frame(run: Run, now: float, width: int = 100) -> RenderableType:
    """The dashboard of one moment."""
    inner = max(30, width - 4)
    warnings = alerts(run, now)
    parts = [
        _progress(run, inner),
        Text(""),
        *_curve("loss", run, run.column("loss"), inner, 8, "cyan"),
        *_curve("tokens/s", run, run.column("tokens_per_s"), inner, 5, "green"),
        _figures(run, now, inner),
        *_predicted(run),
        *(shown(f"! {warning}", "bold red") for warning in warnings),
    ]
    state = "complete" if finished(run) else ("look here" if warnings else "running")
    colour = {"complete": "green", "look here": "red", "running": "cyan"}[state]
    title = shown(f"{run.name}: {state}", colour)
    return Panel(Group(*parts), title=title, border_style=colour, width=inner + 4)


def shown(text: str, style: str = "") -> Text:
    """A text that is neither rich's markup nor of effect on the terminal."""
    return Text(visible(text), style=style)


def _progress(run: Run, width: int) -> RenderableType:
    tokens = run.tokens[-1]
    if run.config is None:
        return f"{amount(tokens)} tokens"
    total = run.config.schedule.total_tokens
    left = "" if finished(run) else f"   {duration(seconds_left(run))} left"
    share = 100 * min(1.0, tokens / total)
    line = Table.grid(padding=(0, 1))
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    label = f"{share:5.1f}%  {amount(tokens)} of {amount(total)} tokens{left}"
    line.add_row(ProgressBar(total, min(tokens, total), complete_style="cyan"), label)
    line.width = width
    return line


def _curve(
    name: str, run: Run, values: Floats, width: int, height: int, colour: str
) -> list[RenderableType]:
    """A title line, then the curve over tokens between its smallest and its largest value."""
    # A Braille cell is two dots wide.
    means, tokens = binned(values, 2 * width), binned(run.tokens, 2 * width)
    known = np.isfinite(means)
    if not known.any():
        return []
    low, high = float(means[known].min()), float(means[known].max())
    # A flat curve runs in the middle.
    margin = 0.0 if high > low else abs(low) or 1.0
    edges = sorted({low, high})
    ticks = np.linspace(0, run.tokens[-1], 5)
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)  # the panel knows the width, the terminal may be none
    plotext.plotsize(width, height)
    plotext.xlim(0, run.tokens[-1])
    plotext.ylim(low - margin, high + margin)
    plotext.plot(tokens[known].tolist(), means[known].tolist(), marker="braille", color=colour)
    plotext.xaxes(True, False)
    plotext.yaxes(True, False)
    plotext.xticks(ticks.tolist(), [amount(tick) for tick in ticks])
    plotext.yticks(edges, [f"{amount(value, 4):>7}" for value in edges])
    title = Text(f"{name}  ", style="bold").append(amount(values[-1], 5), style=f"bold {colour}")
    return [title, Text.from_ansi(plotext.build().rstrip("\n"))]


def _predicted(run: Run) -> list[RenderableType]:
    """What was predicted beside what is measured, where a plan or a profile is."""
    rows = beside_rows(run)
    if not rows:
        return []
    table = Table.grid(padding=(0, 3, 0, 0))
    for cells in [["", "predicted", "measured", ""], *rows]:
        table.add_row(*(shown(cell, "" if cells in rows else "dim") for cell in cells))
    return [Text(""), table]


def _figures(run: Run, now: float, width: int) -> RenderableType:
    """The last step, the last checkpoint and the run's history."""

    def ago(record: dict[str, Any]) -> str:
        return f"{duration(max(0.0, now - record['time']))} ago" if "time" in record else ""

    last = run.steps[-1]
    saved = [event for event in run.events if event["event"] == "checkpoint"]
    _, losses = run.validation
    cells = [
        ("step", f"{last['step']:,}"),
        ("learning rate", scientific(last["lr"]) if "lr" in last else ""),
        ("batch", f"{amount(last['batch_tokens'])} tokens" if "batch_tokens" in last else ""),
        ("gradient norm", f"{last['grad_norm']:.3g}" if last.get("grad_norm") is not None else ""),
        ("MFU", f"{100 * last['mfu']:.1f}%" if "mfu" in last else ""),
        ("validation loss", f"{losses[-1]:.4f}" if len(losses) else ""),
        ("layout", str(run.facts.get("layout", ""))),
        ("last step", ago(last)),
        ("last checkpoint", f"step {saved[-1]['step']}, {ago(saved[-1])}" if saved else ""),
        ("restarts", str(count(run, "restart"))),
        ("goodput", f"{100 * run.goodput:.1f}%" if math.isfinite(run.goodput) else ""),
    ]
    facts = [Text(f"{name} ", "dim").append_text(shown(value)) for name, value in cells if value]
    table, columns = Table.grid(padding=(0, 3, 0, 0)), max(1, width // 28)
    for first in range(0, len(facts), columns):
        table.add_row(*facts[first : first + columns])
    return table

"""`megagpt watch RUN_DIR`: a live dashboard of a run in a terminal (L3).

Reads nothing but the run folder, so it works on any host that sees it, during the run and after,
and cannot disturb it.
"""

import argparse
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from megagpt.report.series import Run

_BRAILLE = 0x2800
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bit of each dot of a Braille cell: column, then row from the top."""
_QUIET_STEPS = 10
"""A run is quiet when nothing came for so many times its usual step time."""
_QUIET_S = 60.0
_RECENT = 100
"""Steps back to which alerts look."""


class Follower:
    """The lines of a growing metrics.jsonl; each read takes only what was added.

    A file that became shorter, or was replaced, was cut back by a resume: it is read anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._inode = self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """All lines so far. Raises UsageError when the file is not there."""
        from megagpt.log.metrics import decode

        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            raise UsageError(
                f"{self.path}: not found. Expected a run folder, the `output` of a run file whose "
                "training has begun"
            ) from None
        with file:
            inode, size = _identity(file.fileno())
            if inode != self._inode or size < self._offset:
                self.lines, self._inode, self._offset = [], inode, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._offset += len(line)
                try:
                    self.lines.append(decode(line))
                except ValueError:
                    continue  # damage is the report's to name; the watch goes on
        return self.lines


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size


def binned(values: Sequence[float], n: int) -> list[float]:
    """The values in n bins of equal width, each the mean of its finite values, NaN without any."""
    means: list[float] = []
    for index in range(n):
        first = index * len(values) // n
        last = max(first + 1, (index + 1) * len(values) // n)
        part = [value for value in values[first:last] if math.isfinite(value)]
        means.append(sum(part) / len(part) if part else math.nan)
    return means


def plot(values: Sequence[float], height: int) -> list[str]:
    """A curve in `height` lines of Braille characters, 2 x 4 dots each: one column of dots a
    value, the largest at the top and the smallest at the bottom. NaN leaves a gap."""
    rows = 4 * height
    known = [value for value in values if math.isfinite(value)]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    cells = [[0] * -(-len(values) // 2) for _ in range(height)]
    before: int | None = None
    for column, value in enumerate(values):
        if not math.isfinite(value):
            before = None
            continue
        row = round((1 - (value - low) / span) * (rows - 1)) if span else rows // 2
        # The dots between two columns' values join them.
        other = row if before is None else before
        for dot in range(min(row, other), max(row, other) + 1):
            cells[dot // 4][column // 2] |= _DOTS[column % 2][dot % 4]
        before = row
    return ["".join(chr(_BRAILLE + bits) for bits in line) for line in cells]


def alerts(run: "Run", now: float) -> list[str]:
    """What a person should look at, the worst first; `now` in seconds since 1970."""
    import numpy as np

    from megagpt.log.units import amount, duration

    found = []
    recent = run.steps[-_RECENT:]
    usual_s = float(np.nanmedian(run.step_s[-500:])) if np.isfinite(run.step_s[-500:]).any() else 0
    quiet_s = now - max(line.get("time", now) for line in recent)
    if not finished(run) and quiet_s > max(_QUIET_S, _QUIET_STEPS * usual_s):
        found.append(f"no step for {duration(quiet_s)}; a step takes {usual_s:.2g} s")
    leaps = [spike for spike in run.spikes if spike.step >= recent[0]["step"]]
    found += [f"spike at step {spike.step}: {spike.reason}" for spike in leaps[-3:]]
    skipped = [step.get("skipped_steps", 0) for step in recent]
    if skipped[-1] > skipped[0]:
        found.append(f"{skipped[-1] - skipped[0]} of the last {len(recent)} steps were skipped")
    if slow := _slow(run):
        found.append(slow)
    if overdue := _overdue(run):
        found.append(f"no checkpoint for {amount(overdue)} tokens")
    disk = shutil.disk_usage(run.folder)
    if disk.free < 0.05 * disk.total:
        found.append(f"{amount(disk.free)} bytes left on the disk of the run folder")
    return found


def _slow(run: "Run") -> str:
    """Whether the last steps are slower than earlier ones of the same batch size."""
    import numpy as np

    speed, batch = run.column("tokens_per_s")[-1000:], run.column("batch_tokens")[-1000:]
    same = speed[batch == batch[-1]]
    if len(same) < 60 or not np.isfinite(same).all():
        return ""
    usual, last = float(np.median(same[:-20])), float(np.median(same[-20:]))
    if last >= 0.8 * usual:
        return ""
    return f"throughput is {100 * (1 - last / usual):.0f}% below usual at this batch size"


def _overdue(run: "Run") -> float:
    """Tokens since the last checkpoint when that is more than two intervals, else 0."""
    every = run.config.checkpoint.every_tokens if run.config else 0
    saved = [event["tokens"] for event in run.events if event["event"] in ("checkpoint", "resume")]
    since = float(run.tokens[-1]) - max(saved, default=0)
    return since if every and since > 2 * every else 0.0


def finished(run: "Run") -> bool:
    """Whether all tokens of the run's schedule are consumed."""
    return run.config is not None and bool(run.tokens[-1] >= run.config.schedule.total_tokens)


def seconds_left(run: "Run") -> float | None:
    """Estimate of the time to the end, the ramp included; None without a configuration."""
    from megagpt.log.eta import Eta

    if run.config is None:
        return None
    schedule = run.config.schedule
    eta = Eta(schedule.end_tokens, schedule.batch)
    for step, step_s in zip(run.steps[-2000:], run.step_s[-2000:].tolist(), strict=True):
        if math.isfinite(step_s) and step.get("batch_tokens"):
            eta.observe(step["batch_tokens"], step_s)
    return eta.seconds(int(run.tokens[-1]))


def frame(run: "Run", now: float, width: int = 100) -> "RenderableType":
    """The dashboard of one moment."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    inner = max(30, width - 4)
    warnings = alerts(run, now)
    parts: list[RenderableType] = [_progress(run, inner), Text("")]
    loss = run.column("loss")
    parts += _curve("loss", loss, f"{loss[-1]:.4f}", inner, 6, "cyan")
    speed = run.column("tokens_per_s")
    parts += _curve("tokens/s", speed, _amount(speed[-1]), inner, 3, "green")
    parts += [Text(""), _figures(run, now)]
    for warning in warnings:
        parts.append(Text(f"! {warning}", style="bold red"))
    state = "complete" if finished(run) else ("look here" if warnings else "running")
    colour = {"complete": "green", "look here": "red", "running": "cyan"}[state]
    return Panel(
        Group(*parts), title=f"{run.name}: {state}", border_style=colour, width=max(34, width)
    )


def _amount(value: float) -> str:
    from megagpt.log.units import amount

    return amount(value) if math.isfinite(value) else "?"


def _progress(run: "Run", width: int) -> "RenderableType":
    from rich.text import Text

    from megagpt.log.units import duration

    tokens = float(run.tokens[-1])
    if run.config is None:
        return Text(f"{_amount(tokens)} tokens")
    total = run.config.schedule.total_tokens
    share = min(1.0, tokens / total)
    left = "" if finished(run) else f"   {duration(seconds_left(run))} left"
    label = f" {100 * share:5.1f}%  {_amount(tokens)} of {_amount(total)} tokens{left}"
    cells = max(10, width - len(label))
    full = round(share * cells)
    bar = Text("\N{BOX DRAWINGS HEAVY HORIZONTAL}" * full, style="cyan")
    bar.append("\N{BOX DRAWINGS HEAVY HORIZONTAL}" * (cells - full), style="grey37")
    return bar.append(label, style="default")


def _curve(
    name: str, values: Any, last: str, width: int, height: int, colour: str
) -> list["RenderableType"]:
    """A title line, then the curve with its largest and smallest value at the left."""
    from rich.text import Text

    means = binned(values.tolist(), 2 * (width - 9))
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return []
    title = Text(f"{name}  ", style="bold").append(last, style=f"bold {colour}")
    rows: list[RenderableType] = [title]
    edges = {0: max(finite), height - 1: min(finite)}
    for index, line in enumerate(plot(means, height)):
        edge = edges.get(index, math.nan)
        label = f"{edge:.3f}" if edge < 1000 else _amount(edge)
        rows.append(
            Text(f"{label if index in edges else '':>8} ", style="dim").append(line, colour)
        )
    return rows


def _figures(run: "Run", now: float) -> "RenderableType":
    from rich.table import Table

    from megagpt.log.units import scientific

    last = run.steps[-1]
    cells = [("step", f"{last['step']:,}")]
    if "lr" in last:
        cells.append(("learning rate", scientific(last["lr"])))
    if "batch_tokens" in last:
        cells.append(("batch", f"{_amount(last['batch_tokens'])} tokens"))
    if last.get("grad_norm") is not None:
        cells.append(("gradient norm", f"{last['grad_norm']:.3g}"))
    if "mfu" in last:
        cells.append(("MFU", f"{100 * last['mfu']:.1f}%"))
    _, validation = run.validation
    if len(validation):
        cells.append(("validation loss", f"{validation[-1]:.4f}"))
    cells += _history(run, now)
    table = Table.grid(padding=(0, 3))
    for row in range(0, len(cells), 3):
        part = cells[row : row + 3]
        table.add_row(*(f"[dim]{name}[/] {value}" for name, value in part))
    return table


def _history(run: "Run", now: float) -> list[tuple[str, str]]:
    """Ranks, last step, last checkpoint, restarts and goodput."""
    from megagpt.log.units import duration

    cells = []
    if "layout" in run.facts:
        cells.append(("layout", str(run.facts["layout"])))
    if "time" in run.steps[-1]:
        cells.append(("last step", f"{duration(max(0.0, now - run.steps[-1]['time']))} ago"))
    saved = [event for event in run.events if event["event"] == "checkpoint"]
    if saved:
        ago = duration(max(0.0, now - saved[-1]["time"]))
        cells.append(("last checkpoint", f"step {saved[-1]['step']}, {ago} ago"))
    cells.append(("restarts", str(len(run.restarts))))
    if math.isfinite(run.goodput):
        cells.append(("goodput", f"{100 * run.goodput:.1f}%"))
    return cells


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "watch",
        help="live dashboard of a run in the terminal",
        description="Shows loss, throughput, progress, time left, the last checkpoint and alerts "
        "of the run in RUN_DIR, and follows it. Works on any host that sees the folder; Ctrl-C "
        "leaves the run alone.",
    )
    parser.add_argument("folder", metavar="RUN_DIR", type=Path, help="run folder")
    parser.add_argument(
        "--every",
        metavar="SECONDS",
        type=float,
        default=2.0,
        help="time between looks (default: 2)",
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Shows the dashboard until Ctrl-C, or until the run is complete."""
    from rich.console import Console
    from rich.live import Live

    from megagpt.log.metrics import NAME

    if not args.every > 0:
        raise UsageError(f"--every {args.every}: must be greater than 0 seconds")
    follower, console = Follower(args.folder / NAME), Console()
    if not console.is_terminal:
        console = Console(width=100)
    if args.once:
        console.print(_look(args.folder, follower, console.width)[0])
        return 0
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            done = False
            while not done:
                t0 = time.monotonic()
                shown, done = _look(args.folder, follower, console.width)
                live.update(shown, refresh=True)
                # A long record takes its time: never more than a tenth of it for looking.
                time.sleep(0 if done else max(args.every, 9 * (time.monotonic() - t0)))
    except KeyboardInterrupt:
        return 0
    # The other screen is gone: the last frame stays on this one.
    console.print(shown)
    return 0


def _look(folder: Path, follower: Follower, width: int) -> "tuple[RenderableType, bool]":
    """(the dashboard of now, whether the run is complete)."""
    from megagpt.report.series import read_facts

    lines = follower.read()
    if not any("loss" in line for line in lines):
        return f"{folder}: waiting for the first step", False
    seen = read_facts(folder, lines)
    return frame(seen, time.time(), width), finished(seen)

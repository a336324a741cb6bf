"""`megagpt watch RUN_DIR`: a live dashboard of a run in a terminal (L3).

Reads nothing but the run folder, so it works on any host that sees it, during the run and after,
and cannot disturb it.
"""

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.errors import UsageError
from megagpt.log.metrics import NAME, decode

if TYPE_CHECKING:
    from rich.console import RenderableType


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
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            raise UsageError(
                f"{self.path}: not found. Expected a run folder, the `output` of a run file whose "
                "training has begun"
            ) from None
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self.lines, self._inode, self._offset = [], status.st_ino, 0
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Shows loss, throughput, progress, time left, the last checkpoint and alerts "
        "of the run in RUN_DIR, and follows it. Works on any host that sees the folder; Ctrl-C "
        "leaves the run alone."
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


def run(args: argparse.Namespace) -> None:
    """Shows the dashboard until Ctrl-C, or until the run is complete."""
    from rich.console import Console
    from rich.live import Live

    if not args.every > 0:
        raise UsageError(f"--every {args.every}: must be greater than 0 seconds")
    follower, console = Follower(args.folder / NAME), Console()
    if not console.is_terminal:
        console = Console(width=100)
    if args.once:
        console.print(_look(args.folder, follower, console.width)[0])
        return
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
        return
    # The other screen is gone: the last frame stays on this one.
    console.print(shown)


def _look(folder: Path, follower: Follower, width: int) -> "tuple[RenderableType, bool]":
    """(the dashboard of now, whether the run is complete)."""
    from megagpt.report.dashboard import finished, frame, shown
    from megagpt.report.series import read_facts

    lines = follower.read()
    if not any("loss" in line for line in lines):
        return shown(f"{folder}: waiting for the first step"), False
    seen = read_facts(folder, lines)
    return frame(seen, time.time(), width), finished(seen)

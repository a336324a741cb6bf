"""How a long job goes: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from megagpt.errors import visible

LINE_EVERY_S = 10.0
"""Between two lines where no terminal is."""


class Progress:
    """Counts bytes (and tokens) of a job, or what else its `unit` says; `total` 0 means that the
    end is not known."""

    def __init__(self, label: str, total: int = 0, unit: str = "MB") -> None:
        self._label, self._total, self._unit = visible(label), total, unit
        self._size = 1e6 if unit == "MB" else 1.0
        self._t0 = self._shown = time.monotonic()
        self._done = self._skipped = self._tokens = 0
        self._bar = _bar(self._label, total) if sys.stderr.isatty() else None
        self._every_s = 0.2 if self._bar else LINE_EVERY_S

    def skip(self, size: int) -> None:
        """What an earlier run has done: part of the whole, not of the rate."""
        self._done += size
        self._skipped += size

    def add(self, size: int, tokens: int = 0) -> None:
        """What is done now of the total, and its tokens."""
        self._done += size
        self._tokens += tokens
        now = time.monotonic()
        if now - self._shown < self._every_s:
            return
        self._shown = now
        state = self.state(now - self._t0)
        if self._bar:
            self._bar.update(0, completed=self._done, state=state, refresh=True)
        else:
            print(f"{self._label}: {state}", file=sys.stderr, flush=True)

    def state(self, elapsed_s: float) -> str:
        """The figures in words."""
        rate = (self._done - self._skipped) / max(elapsed_s, 1e-9)
        parts = [f"{self._done / self._size:,.0f} {self._unit}"]
        if self._total:
            parts[0] += f" of {self._total / self._size:,.0f} ({self._done / self._total:.0%})"
        parts.append(f"{rate / self._size:,.1f} {self._unit}/s")
        if self._tokens:
            parts.append(f"{self._tokens / max(elapsed_s, 1e-9):,.0f} tokens/s")
        if self._total and rate:
            left = int(max(self._total - self._done, 0) / rate)
            parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        return ", ".join(parts)

    def close(self) -> None:
        """Clear the bar."""
        if self._bar:
            self._bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bar(label: str, total: int) -> Any:
    # 0.1 s of imports that nobody waits for where no terminal is.
    from rich import progress
    from rich.console import Console

    # No thread refreshes it, so that the process may still fork.
    bar = progress.Progress(
        # A name in the label is no markup.
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[state]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
    )
    bar.add_task(label, total=total or None, state="")
    bar.start()
    return bar

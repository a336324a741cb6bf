"""One line that tells how a long job goes: redrawn on a terminal, every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Counts bytes (and tokens) of a job; `total_bytes` 0 means that the end is not known."""

    def __init__(self, label: str, total_bytes: int = 0, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._label, self._total = label, total_bytes
        self._t0 = self._shown = time.monotonic()
        self._bytes = self._skipped = self._tokens = 0
        self._every_s = 0.2 if self._live else 10.0

    def skip(self, size: int) -> None:
        """Bytes that an earlier run has done: part of the whole, not of the rate."""
        self._bytes += size
        self._skipped += size

    def add(self, size: int, tokens: int = 0) -> None:
        """Bytes (of the total) and tokens that are done now."""
        self._bytes += size
        self._tokens += tokens
        now = time.monotonic()
        if now - self._shown >= self._every_s:
            self._shown = now
            end = "" if self._live else "\n"
            start = "\r\x1b[K" if self._live else ""
            print(start + self.line(now - self._t0), end=end, file=self._stream, flush=True)

    def line(self, elapsed_s: float) -> str:
        """The text of the line."""
        rate = (self._bytes - self._skipped) / max(elapsed_s, 1e-9)
        parts = [f"{self._bytes / 1e6:,.0f} MB"]
        if self._total:
            parts[0] += f" of {self._total / 1e6:,.0f} ({self._bytes / self._total:.0%})"
        parts.append(f"{rate / 1e6:,.1f} MB/s")
        if self._tokens:
            parts.append(f"{self._tokens / max(elapsed_s, 1e-9):,.0f} tokens/s")
        if self._total and rate:
            left = int(max(self._total - self._bytes, 0) / rate)
            parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        return f"{self._label}: " + ", ".join(parts)

    def close(self) -> None:
        """Clear the line of a terminal."""
        if self._live:
            print("\r\x1b[K", end="", file=self._stream, flush=True)

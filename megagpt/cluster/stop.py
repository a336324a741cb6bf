"""Why a run should stop before its end: a signal, a time limit, a number of steps (L2).

Each rank looks at its own signals and clock; the training loop adds the answers up, so that all
ranks stop after the same step. The loop (loop.py) saves then (`save_if_due`) and raises Stopped
(`leave_if_asked`), of which `megagpt.train` makes the exit code.
"""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megagpt.config import CheckpointConfig
from megagpt.errors import Stopped

UNMEASURED_S = 120.0
"""Seconds that a save is taken to last before the first one was measured."""
LEAVE_S = 10.0
"""Seconds to close files and the process group."""
SLURM_END = "SLURM_JOB_END_TIME"
"""When SLURM ends the job, in seconds since 1970; 22.05.8 was seen not to set it."""


@dataclass
class TimeLimit:
    """When to stop so that the save is over before the end of the time.

    All times are seconds on the clock of `time.time()`.
    """

    end: float
    """When everything must be over."""
    name: str
    """What set it, for messages."""
    start: float
    step_s: float = 0.0
    """Longest time between two looks, which evaluations and saves are part of."""
    _looked: float = -1.0

    def margin_s(self, save_s: float) -> float:
        """Seconds before the end at which to stop: twice what a step and a save took so far.

        save_s: duration of the longest save, 0 before the first.
        """
        allowed = self.end - self.start
        save_s = 2 * save_s or min(UNMEASURED_S, allowed / 20)
        return 2 * self.step_s + save_s + min(LEAVE_S, allowed / 20)

    def reached(self, now: float, save_s: float) -> bool:
        """Whether it is time to stop; call it once a step."""
        if self._looked >= 0:
            self.step_s = max(self.step_s, now - self._looked)
        self._looked = now
        return now >= self.end - self.margin_s(save_s)


def time_limit(minutes: float, environ: Mapping[str, str], now: float) -> TimeLimit | None:
    """The earlier of `minutes` from now (0: none) and the end of SLURM's job, where there is one.

    A SLURM variable that is no number, or tells of a time that is over, is as good as none: a shell
    keeps that of a job which has ended.
    """
    found = []
    if minutes > 0:
        found.append(TimeLimit(now + 60 * minutes, "checkpoint.stop_after_minutes", now))
    if environ.get(SLURM_END, "").isdecimal() and float(environ[SLURM_END]) > now:
        found.append(TimeLimit(float(environ[SLURM_END]), SLURM_END, now))
    return min(found, key=lambda limit: limit.end, default=None)


class StopRequest:
    """Remembers why this process was asked to stop; as a context it listens to the signals."""

    SIGNALS = (
        *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
        # What batch systems are told to send before the end.
        *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
    )

    def __init__(
        self, config: CheckpointConfig | None = None, environ: Mapping[str, str] | None = None
    ) -> None:
        """Without a configuration only signals stop the run. The time counts from here on."""
        minutes = config.stop_after_minutes if config else 0.0
        self.limit = time_limit(minutes, environ or {}, time.time())
        self.steps_left = config.stop_after_steps if config else 0
        self.reason = ""
        """Empty: go on."""

    def __enter__(self) -> "StopRequest":
        # nohup has a process ignore SIGHUP, so that it outlives a terminal.
        deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [s for s in self.SIGNALS if not (deaf and s == signal.SIGHUP)]
        self._before = {s: signal.signal(s, self._remember) for s in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: object) -> None:
        self.reason = signal.Signals(number).name

    def waits(self, alive: Callable[[], None]) -> None:
        """What a run does now and then before it has its folder. Raises Stopped where it was asked
        to stop."""
        alive()
        if self.reason:
            raise Stopped(f"stopped by {self.reason} before it began; run the same command again")

    def look(self, save_s: float = 0.0) -> bool:
        """Whether to stop; call it once, at the end of each step.

        save_s: seconds that the longest save took so far, which the time limit leaves room for.
        """
        self.steps_left -= 1  # 0 from the start is no limit: it never comes back to 0
        if self.steps_left == 0:
            self.reason = self.reason or "checkpoint.stop_after_steps"
        if self.limit is not None and self.limit.reached(time.time(), save_s):
            self.reason = self.reason or f"the time limit ({self.limit.name})"
        return bool(self.reason)

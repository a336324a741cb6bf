"""When the run will be done, the batch ramp taken into account (L1, stdlib only).

Small batches are slower per token than large ones: each step pays a fixed time (gradient
exchange, optimizer, launches) besides the time for its tokens. The model is
step time = a + b * batch, fitted to the step times seen at the last few batch sizes; what is
left to do is a times the steps left plus b times the tokens left.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable

_SIZES = 8
"""Batch sizes that the fit remembers; older ones may come from another speed of the machine."""
_GRID = 512
"""Points at which the rest of the ramp is sampled."""
_STEPS = 40
"""Latest steps of a batch size of whose times the mean is taken."""


class Eta:
    """Seconds until `total_tokens` are consumed.

    `batch` gives the batch size (tokens) of the step that starts at so many tokens consumed;
    None: the last batch size is taken for the rest of the run.
    """

    def __init__(self, total_tokens: int, batch: Callable[[int], int] | None = None) -> None:
        self.total_tokens = total_tokens
        self._batch = batch
        self._times: dict[int, deque[float]] = {}
        """Batch size -> seconds of its latest steps, the oldest size first."""
        self._last = 0
        self._n_steps = 0
        self._t0 = 0.0
        self._busy_s = 0.0

    def observe(self, batch_tokens: int, step_s: float) -> None:
        """Take the time of one step into account."""
        if self._n_steps:
            self._busy_s += step_s
        else:
            self._t0 = time.monotonic()
        if self._n_steps == 1:
            # The first step of a session pays for caches, compilation and connections.
            self._times.clear()
        self._times.setdefault(batch_tokens, deque(maxlen=_STEPS)).append(step_s)
        self._n_steps += 1
        self._last = batch_tokens
        while len(self._times) > _SIZES:
            del self._times[next(iter(self._times))]

    def seconds(self, tokens: int) -> float | None:
        """Seconds left at `tokens` consumed; None before the first step."""
        left = self.total_tokens - tokens
        if left <= 0:
            return 0.0
        if not self._times:
            return None
        fixed_s, per_token_s = self._fit()
        return (fixed_s * self._steps_left(tokens) + per_token_s * left) * self._stall()

    def _stall(self) -> float:
        """Wall time over step time so far: what evaluations and checkpoints add."""
        if self._n_steps < 10 or not self._busy_s:
            return 1.0
        return max(1.0, (time.monotonic() - self._t0) / self._busy_s)

    def _fit(self) -> tuple[float, float]:
        """(a, b) by least squares with both >= 0, through the mean time of the last batch size."""
        means = {size: statistics.fmean(times) for size, times in self._times.items()}
        last_s = means[self._last]
        slope = proportional = last_s / self._last
        if len(means) > 1:
            fitted = statistics.linear_regression(list(means), list(means.values()))
            slope = min(max(fitted.slope, 0.0), proportional)
        return last_s - slope * self._last, slope

    def _steps_left(self, tokens: int) -> float:
        left = self.total_tokens - tokens
        if self._batch is None:
            return left / self._last
        width = left / _GRID
        return sum(width / self._batch(int(tokens + (i + 0.5) * width)) for i in range(_GRID))

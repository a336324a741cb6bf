"""Spikes of the loss and of the gradient norm, by a robust z-score (L2, no torch).

z = (x - median) / (1.4826 MAD) over the latest steps, MAD the median of the distances to the
median: 1.4826 MAD estimates a normal distribution's standard deviation (Rousseeuw and Croux 1993),
and a spike among the latest steps does not hide the next one. The norm is taken as its logarithm,
since norms vary by factors. Both numbers are the same on every rank, and so is the verdict. What
follows from it, by `optimizer.spike_action`, is loop.py's.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

FEWEST = 16
"""Steps without which no step is called a spike (a smaller window: as many as it holds)."""
TIGHTEST = 1e-3
"""Least spread that is believed, of the loss relative to its median, of the log norm absolutely:
equal values in a row would make any other value a spike."""


def z_score(x: float, latest: Iterable[float], least: float) -> float:
    """Robust z-score of x against the values in `latest`; their spread is at least `least`."""
    values = sorted(latest)
    median = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(v - median) for v in values)
    return (x - median) / max(spread, least)


@dataclass
class SpikeDetector:
    """Compares each step with those before it; its state is `history` alone."""

    window: int
    """Steps that are looked back on."""
    threshold: float
    """Robust standard deviations above the median from which on a step is a spike."""
    history: list[tuple[float, float]] = field(default_factory=list)
    """(loss in nats, gradient norm) of the latest steps, oldest first."""
    skipped: int = 0
    """Steps in a row, up to now, without an update."""

    def verdict(self, loss: float, norm: float) -> str:
        """Why a step with these numbers is a spike, "" when it is none; changes nothing.

        Values that are not finite are none: DeepSpeed skips such an update by itself.
        """
        few = len(self.history) < min(FEWEST, self.window)
        if few or not (math.isfinite(loss) and math.isfinite(norm)):
            return ""
        losses, norms = zip(*self.history, strict=True)
        least = TIGHTEST * abs(statistics.median(losses))
        z = z_score(loss, losses, least or TIGHTEST)
        if z > self.threshold:
            return f"loss {loss:.4f} is {z:.1f} robust deviations above the latest {len(losses)}"
        z = z_score(_log(norm), map(_log, norms), TIGHTEST)
        if z > self.threshold:
            return f"gradient norm {norm:.4g} is {z:.1f} robust deviations above the latest steps"
        return ""

    def add(self, loss: float, norm: float, applied: bool = True) -> str:
        """Takes in a step; why it is a spike, "" when it is none.

        A spike is among the values that later steps are compared with, skipped or not: where the
        loss has come to stay at another level, that level is normal half a window later. Values
        that are not finite are not.
        """
        self.skipped = 0 if applied else self.skipped + 1
        reason = self.verdict(loss, norm)
        if math.isfinite(loss) and math.isfinite(norm):
            self.history = [*self.history, (loss, norm)][-self.window :]
        return reason

    def give_up(self, limit: int) -> str:
        """Why the run ends after `limit` steps in a row without an update; "" before."""
        if self.skipped < limit:
            return ""
        return (
            f"{self.skipped} steps in a row left the weights as they were, because their loss or "
            "gradient was not finite or spiked; lower schedule.peak_lr, or look at the data of "
            "these steps"
        )


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))

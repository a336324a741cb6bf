"""A whole run with its failures, many times over (L0: numpy, no torch).

Nodes fail independently and without memory; the job loses what it did since its last checkpoint,
waits for the queue and starts again. Work done until a failure counts in whole checkpoint
intervals, unless a notice leaves time to save (spot machines).
"""

import math
from dataclasses import dataclass

import numpy as np

from megagpt.plan.jobs import Column

GPU_HOURS_PER_FAILURE = 50_000.0
"""Of H100s: 419 interruptions in 54 days on 16,384 of them (Grattafiori et al. 2024, Llama 3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weather:
    """What goes wrong, in seconds where nothing else is said."""

    failure_every: float
    """Between failures of the whole job, on average."""
    save: float
    """In which training stands still for a checkpoint."""
    restart: float
    """From the end of a start to its first step."""
    queue: float
    """In the queue after each failure, on average."""
    notice: bool = False
    """Whether a failure is announced early enough to save."""


@dataclass(frozen=True, slots=True)
class Campaign:
    """What a thousand simulated runs took."""

    days: Column
    goodput: Column
    """Share of the time that led to the end."""

    def middle(self, values: Column) -> tuple[float, float, float]:
        """10%, 50% and 90% of the runs are below."""
        low, mid, high = np.quantile(values, (0.1, 0.5, 0.9))
        return float(low), float(mid), float(high)


def simulate(
    work_s: float, interval_s: float, weather: Weather, runs: int = 1000, seed: int = 0
) -> Campaign:
    """`runs` simulations of `work_s` seconds of training with a checkpoint every `interval_s`."""
    random = np.random.default_rng(seed)
    left = np.full(runs, float(work_s))
    spent = np.full(runs, float(weather.restart))
    cycle = interval_s + weather.save
    active = left > 0
    while active.any():
        n = int(active.sum())
        until = random.exponential(weather.failure_every, n)
        need = left[active] + np.floor(left[active] / interval_s) * weather.save
        ends = until >= need
        if weather.notice:
            done = np.maximum(0.0, until - weather.save) * interval_s / cycle
        else:
            done = np.floor(until / cycle) * interval_s
        wait = weather.restart + random.exponential(max(weather.queue, 1e-9), n)
        spent[active] += np.where(ends, need, until + wait)
        left[active] = np.where(ends, 0.0, np.maximum(left[active] - done, 1e-9))
        active = left > 0
        # Where nothing is ever saved between failures, no run ends.
        if spent.max() > 1000 * work_s + 1e9:
            break
    return Campaign(spent / 86_400, work_s / spent)


def best_interval(weather: Weather) -> float:
    """Seconds between checkpoints that lose least: the first term of Daly 2006, and four hours
    where a notice leaves time to save."""
    if weather.notice:
        return 4 * 3600.0
    return max(
        math.sqrt(2 * weather.save * weather.failure_every) - weather.save, weather.save, 60.0
    )

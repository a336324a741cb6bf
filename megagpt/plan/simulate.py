"""A whole run with its failures, many times over (L0: numpy, no torch).

Nodes fail independently and without memory; the job loses what it did since its last checkpoint,
waits for the queue and starts again. Work done until a failure counts in whole checkpoint
intervals. What ends with notice (spot machines, preemption) saves first and loses nothing.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from megagpt.errors import UsageError
from megagpt.plan.jobs import Column

GPU_HOURS_PER_FAILURE = 50_000.0
"""Of H100s: 419 interruptions in 54 days on 16,384 of them (Grattafiori et al. 2024, Llama 3)."""
GPU_HOURS_PER_NOTICE = 2000.0
"""Of spot machines: eight GPUs are taken away every ten days; it differs from day to day."""


MOST_WASTE = 100.0
"""A run of more than so many times its work is told as one that never ends."""
MOST_FAILURES = 20_000
"""Of one run; a simulation of more would take minutes."""


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
    behind: float = 0.0
    """From the moment that a checkpoint holds until it counts: one that is written beside training
    is of no use before it is whole."""
    notice_every: float = math.inf
    """Between ends of the whole job that are announced early enough to save, on average."""

    @property
    def every(self) -> float:
        """Between ends of either kind."""
        return 1 / (1 / self.failure_every + 1 / self.notice_every)


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


class NeverEnds(UsageError):
    """A run that failures keep from its end."""


def hopeless(work_s: float, interval_s: float, weather: Weather) -> str:
    """Why such a run does not end, or not within what is worth simulating; empty where it does.

    A stretch of c seconds between two checkpoints is tried exp(c / f) times where failures come
    every f seconds on average; what is announced costs the save and what follows alone.
    """
    every, cycle = weather.every, interval_s + weather.save
    announced = every / weather.notice_every
    # What is left of an exponential time after the save's seconds are taken from it.
    done = announced * every * math.exp(-min(700.0, weather.save / every)) * interval_s / cycle
    tries = math.expm1(min(700.0, cycle / every)) * math.exp(min(700.0, weather.behind / every))
    failures = work_s / max(done + (1 - announced) * interval_s / tries, 1e-300)
    spent = failures * (every + weather.restart + weather.queue)
    text = (
        f"a failure every {every / 60:,.3g} min and a checkpoint every {interval_s / 60:,.3g} min "
        f"({weather.save:,.3g} s to save, {(weather.restart + weather.queue) / 60:,.3g} min to "
        "start again)"
    )
    if spent > MOST_WASTE * work_s:
        return f"{text}: more than {1 - 1 / MOST_WASTE:.0%} of the time is lost, it never ends"
    if failures > MOST_FAILURES:
        return f"{text}: {failures:,.3g} failures are more than the {MOST_FAILURES:,} simulated"
    return ""


def simulate(
    work_s: float | Column, interval_s: float, weather: Weather, runs: int = 1000, seed: int = 0
) -> Campaign:
    """`runs` simulations of `work_s` seconds of training with a checkpoint every `interval_s`.

    Raises NeverEnds where failures come so often that the run gets nowhere.
    """
    work = np.broadcast_to(np.asarray(work_s, dtype=float), (runs,))
    if why := hopeless(float(np.median(work)), interval_s, weather):
        raise NeverEnds(
            f"--simulate: {why}; save more often (checkpoint.every_tokens), or raise "
            "--gpu-hours-per-failure, or --gpu-hours-per-notice with --spot"
        )
    random = np.random.default_rng(seed)
    left = work.copy()
    spent = np.full(runs, float(weather.restart))
    cycle = interval_s + weather.save
    active = left > 0
    while active.any():
        n = int(active.sum())
        until = random.exponential(weather.every, n)
        need = left[active] + np.floor(left[active] / interval_s) * weather.save
        ends = until >= need
        saved = np.maximum(0.0, until - weather.save) * interval_s / cycle
        whole = np.floor(np.maximum(0.0, until - weather.behind) / cycle) * interval_s
        announced = random.random(n) < weather.every / weather.notice_every
        done = np.where(announced, saved, whole)
        wait = weather.restart + random.exponential(max(weather.queue, 1e-9), n)
        spent[active] += np.where(ends, need, until + wait)
        left[active] = np.where(ends, 0.0, np.maximum(left[active] - done, 1e-9))
        active = left > 0
    return Campaign(spent / 86_400, work / spent)


def spread_of(ends: tuple[float, float], runs: int = 1000, seed: int = 1) -> Column:
    """Factors of a step's time: 10% lie below `ends`, 10% above, half below 1, which is the
    prediction; each side of it is half of a log-normal distribution. Evenly spread, in an order
    that `seed` decides: their median is the prediction itself, in a thousand runs too."""
    low, high = np.abs(np.log(ends)) / 1.2816
    even = [NormalDist().inv_cdf((n + 0.5) / runs) for n in range(runs)]
    drawn = np.random.default_rng(seed).permutation(even)
    return np.asarray(np.exp(drawn * np.where(drawn < 0, low, high)))


def best_interval(weather: Weather) -> float:
    """Seconds between checkpoints that lose least: the first term of Daly 2006. What is announced
    loses nothing, however long ago the last one was."""
    return max(
        math.sqrt(2 * weather.save * weather.failure_every) - weather.save, weather.save, 60.0
    )

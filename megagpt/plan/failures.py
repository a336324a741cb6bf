"""What failures make of a plan: goodput, the date of the end, cost, how often to save (L0)."""

import datetime
from dataclasses import dataclass, replace

from megagpt.plan.disk import WRITE_RATE, checkpoint_bytes
from megagpt.plan.judge import Judgement
from megagpt.plan.simulate import NeverEnds, Weather, best_interval, simulate, spread_of

COPY_RATE = 5e9
"""Bytes/s at which a rank copies its part of a checkpoint to its host, the others beside it."""
Middle = tuple[float, float, float]
"""10%, 50% and 90% of the simulated runs are below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storm:
    """What --simulate is asked for."""

    failures: float
    """GPU-hours between two, on average."""
    notices: float
    """The same of machines that leave with notice; infinite where none does."""
    restart_s: float
    queue_s: float
    spot: float | None = None
    """Dollars for a GPU-hour of machines that leave with notice; None: they are not such."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """A run with its failures, for one interval between checkpoints."""

    saves: str
    """As the run file saves, or at best."""
    interval_s: float
    goodput: Middle | None = None
    """Share of the time that led to the end; None where the run never ends."""
    days: Middle | None = None
    dollars: Middle | None = None
    ends: tuple[str, ...] = ()
    """Dates of the end for a start today, at 10%, 50% and 90%."""
    never: str = ""
    """Why the run never ends."""


def outlooks(one: Judgement, storm: Storm, today: datetime.date) -> list[Outlook]:
    """As the run file saves, and at the best interval; step times vary within their interval too.

    Raises NeverEnds where not even the best interval leads to an end.
    """
    cluster, config = one.cluster, one.candidate.config
    nodes = -(-cluster.gpus // cluster.per_node)
    size, beside = checkpoint_bytes(config.model), config.checkpoint.background
    write = size / (nodes * WRITE_RATE)
    weather = Weather(
        failure_every=storm.failures * 3600 / cluster.gpus,
        notice_every=storm.notices * 3600 / cluster.gpus,
        # In the background only the copy to the host's memory stops the step.
        save=size / (cluster.gpus * COPY_RATE) if beside else write,
        behind=write if beside else 0.0,
        restart=storm.restart_s,
        queue=storm.queue_s,
    )
    price = cluster.dollars if storm.spot is None else storm.spot
    # Saved is between steps, however few tokens every_tokens are.
    steps = config.checkpoint.every_tokens / config.schedule.segments[-1].batch_tokens
    own = max(1.0, steps) * one.step if steps else one.days * 86_400
    work = one.days * 86_400 * spread_of(one.time_ends)

    def outlook(saves: str, interval: float) -> Outlook:
        # A save waits for the one before, where that is still being written beside training.
        save = weather.save + max(0.0, weather.behind - interval)
        run = simulate(work, interval, replace(weather, save=save))
        days = run.middle(run.days)
        low, middle, high = (24 * cluster.gpus * price * day for day in days)
        return Outlook(
            saves=saves,
            interval_s=interval,
            goodput=run.middle(run.goodput),
            days=days,
            dollars=(low, middle, high),
            ends=tuple(_date(today, day) for day in days),
        )

    try:
        found = [outlook("as the run file saves", own)]
    except NeverEnds as error:
        never = str(error).removeprefix("--simulate: ")
        found = [Outlook(saves="as the run file saves", interval_s=own, never=never)]
    return [*found, outlook("at best", max(best_interval(weather), weather.behind, one.step))]


def _date(today: datetime.date, days: float) -> str:
    """The day of the end; empty beyond the calendar."""
    try:
        return (today + datetime.timedelta(days=days)).isoformat()
    except OverflowError:
        return ""

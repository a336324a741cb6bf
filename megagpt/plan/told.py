"""A judgement as a person reads it (L0)."""

from collections.abc import Sequence

from megagpt.plan.judge import HOST_WATTS, Judgement, decided_by, with_higher_start
from megagpt.plan.memory import checkpoint_bytes
from megagpt.plan.simulate import Weather, best_interval, simulate
from megagpt.plan.table import aligned

COPY_RATE = 5e9
"""Bytes/s at which a rank copies its part of a checkpoint to its host, the others beside it."""
WRITE_RATE = 0.5e9
"""Bytes/s at which a host writes to a shared file system, as `megagpt launch` takes it."""


def judgement_as_text(one: Judgement) -> str:
    """Memory by stage, a step by item, and what the run takes."""
    cluster, config = one.cluster, one.candidate.config
    low, high = one.time_ends
    least, most = (one.peak * end / 1e9 for end in one.memory_ends)
    step = ", ".join(f"{name} {seconds:.3g}" for name, seconds in one.items.items() if seconds)
    watts = one.gpu_hours * cluster.device.watts * HOST_WATTS
    lines = [
        f"on {cluster.gpus:,} {cluster.gpu}: {one.candidate}: {one.peak / 1e9:.1f} GB of "
        f"{cluster.device.memory_gb:.0f} (80%: {least:.1f} to {most:.1f})",
        _stages_as_text(one),
        f"step: {one.step:.3g} s (80%: {one.step * low:.3g} to {one.step * high:.3g}): {step}",
        f"MFU {one.utilisation('none'):.1%}, HFU "
        f"{one.utilisation(config.parallel.recompute):.1%}; the causal half of attention counted",
        f"whole run: {one.days:,.3g} days (80%: {one.days * low:,.3g} to {one.days * high:,.3g}), "
        f"{one.gpu_hours:,.0f} GPU-hours, {watts / 1e6:,.3g} MWh, "
        f"${one.gpu_hours * cluster.dollars:,.0f} at ${cluster.dollars:.2f} an hour",
    ]
    if ramp := _ramp_as_text(one):
        lines.append(ramp)
    return "\n".join(lines)


def _ramp_as_text(one: Judgement) -> str:
    """How long the ramp takes, and what starting it higher would save."""
    config = one.candidate.config
    pairs = list(zip(config.schedule.segments, one.seconds, strict=True))
    tokens = min(config.schedule.ramp_tokens, config.schedule.end_tokens)
    if len(pairs) == 1 or not tokens:
        return ""
    days = sum(s.n_steps * t for s, t in pairs if s.first_tokens < tokens) / 86_400
    text = f"ramp: {days:.3g} days for {tokens / config.schedule.end_tokens:.1%} of the tokens"
    if higher := with_higher_start(one):
        start = higher.candidate.config.schedule.ramp_start_tokens
        text += f"; {higher.days:,.3g} days in all with a ramp that starts at {start} tokens"
    return text


def _stages_as_text(one: Judgement) -> str:
    """GB by item of the first, the fullest and the last stage; all stages with --json."""
    totals = [sum(stage.values()) for stage in one.stages]
    shown = sorted({0, totals.index(max(totals)), len(totals) - 1})
    cells: list[Sequence[str]] = [("GB of stage", *one.stages[0], "in all")]
    for stage in shown:
        sizes = [*one.stages[stage].values(), totals[stage]]
        cells.append((f"{stage}", *(f"{size / 1e9:.2f}" for size in sizes)))
    return aligned(cells)


def search_as_text(found: Sequence[Judgement]) -> str:
    """The best layouts, and what the two nearest losers lose by."""
    cells: list[Sequence[str]] = [("", "layout", "step s", "GB", "MFU", "days")]
    for rank, one in enumerate(found, 1):
        figures = f"{one.step:.3g}", f"{one.peak / 1e9:.1f}", f"{one.utilisation('none'):.1%}"
        cells.append((f"{rank}", str(one.candidate), *figures, f"{one.days:,.3g}"))
    lines = [aligned(cells)]
    for one in found[1:3]:
        item, seconds = decided_by(one, found[0])
        lines.append(f"{one.candidate}: loses {seconds:.2g} s a step by {item}")
    return "\n".join(lines) + "\nuse the first: " + " ".join(found[0].candidate.keys)


def simulation_as_text(
    one: Judgement, gpu_hours: float, restart_s: float, queue_s: float, spot: float | None
) -> str:
    """The run with failures: goodput, days, cost, and the interval between checkpoints."""
    cluster, config = one.cluster, one.candidate.config
    nodes = -(-cluster.gpus // cluster.per_node)
    size = checkpoint_bytes(config.model)
    # In the background only the copy to the host's memory stops the step.
    rate = cluster.gpus * COPY_RATE if config.checkpoint.background else nodes * WRITE_RATE
    weather = Weather(
        failure_every=gpu_hours * 3600 / cluster.gpus,
        save=size / rate,
        restart=restart_s,
        queue=queue_s,
        notice=spot is not None,
    )
    tokens = config.schedule.segments[-1].batch_tokens
    own = config.checkpoint.every_tokens / tokens * one.step or one.days * 86_400
    price, lines = cluster.dollars if spot is None else spot, []
    for name, interval in (("as the run file saves", own), ("at best", best_interval(weather))):
        run = simulate(one.days * 86_400, interval, weather)
        low, mid, high = run.middle(run.days)
        bad, good, top = run.middle(run.goodput)
        cost = mid * 24 * cluster.gpus * price
        lines.append(
            f"with failures, {name}, every {interval / 60:,.3g} min: goodput {good:.1%} "
            f"({bad:.1%} to {top:.1%}), {mid:,.3g} days ({low:,.3g} to {high:,.3g}), ${cost:,.0f}"
        )
    return "\n".join(lines)

"""A judgement as a person reads it (L0)."""

from collections.abc import Sequence

from megagpt.plan.failures import Outlook
from megagpt.plan.judge import Judgement, decided_by, ramp_days, with_higher_start
from megagpt.plan.ramp import aligned, time_unit


def judgement_as_text(one: Judgement) -> str:
    """Memory by stage, a step by item, and what the run takes."""
    cluster, config = one.cluster, one.candidate.config
    low, high = one.time_ends
    least, most = (one.peak * end / 1e9 for end in one.memory_ends)
    step = ", ".join(f"{name} {seconds:.3g}" for name, seconds in one.items.items() if seconds)
    mfu, again = one.utilisation("none"), one.utilisation(config.parallel.recompute)
    dollars = one.gpu_hours * cluster.dollars
    unit, per_day = time_unit(one.days)
    time, short, long = (f"{x * one.days * per_day:,.3g}" for x in (1, low, high))
    lines = [
        f"on {cluster.gpus:,} {cluster.gpu}: {one.candidate}: {one.peak / 1e9:.1f} GB of "
        f"{cluster.device.memory_gb:.0f} (80%: {least:.1f} to {most:.1f})",
        _stages_as_text(one),
        *_host_as_text(one),
        f"step: {one.step:.3g} s (80%: {one.step * low:.3g} to {one.step * high:.3g}): {step}",
        f"MFU {mfu:.1%} (80%: {mfu / high:.1%} to {mfu / low:.1%}), HFU {again:.1%}; the causal "
        "half of attention counted",
        f"whole run: {time} {unit} (80%: {short} to {long}), "
        f"{one.gpu_hours:,.0f} GPU-hours, {one.mwh:,.3g} MWh, ${dollars:,.0f} (80%: "
        f"${dollars * low:,.0f} to ${dollars * high:,.0f}) at ${cluster.dollars:.2f} an hour",
    ]
    if ramp := _ramp_as_text(one):
        lines.append(ramp)
    return "\n".join(lines)


def _host_as_text(one: Judgement) -> list[str]:
    """What a node's host keeps of what is offloaded; nothing without offload."""
    told = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in one.host.items())
    whole = sum(one.host.values()) / 1e9
    line = f"host of a node: {whole:,.1f} GB of {one.cluster.host:,.0f} for {told}"
    return [line] if one.host else []


def _ramp_as_text(one: Judgement) -> str:
    """How long the ramp takes, and what starting it higher would save."""
    schedule, days = one.candidate.config.schedule, ramp_days(one)
    if not days:
        return ""
    tokens = min(schedule.ramp_tokens, schedule.end_tokens)
    unit, per_day = time_unit(days)
    text = f"ramp: {days * per_day:.3g} {unit} for {tokens / schedule.end_tokens:.1%} of the tokens"
    if higher := with_higher_start(one):
        start = higher.candidate.config.schedule.ramp_start_tokens
        unit, per_day = time_unit(higher.days)
        text += f"; {higher.days * per_day:,.3g} {unit} in all with a ramp that starts at {start}"
        text += " tokens"
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
    unit, per_day = time_unit(found[0].days)
    cells: list[Sequence[str]] = [("", "layout", "step s", "GB", "MFU", unit)]
    for rank, one in enumerate(found, 1):
        figures = f"{one.step:.3g}", f"{one.peak / 1e9:.1f}", f"{one.utilisation('none'):.1%}"
        cells.append((f"{rank}", str(one.candidate), *figures, f"{one.days * per_day:,.3g}"))
    lines = [aligned(cells)]
    for one in found[1:3]:
        item, seconds = decided_by(one, found[0])
        lines.append(f"{one.candidate}: loses {seconds:.2g} s a step by {item}")
    return "\n".join(lines) + "\nuse the first: " + " ".join(found[0].candidate.keys)


def outlooks_as_text(found: Sequence[Outlook]) -> str:
    """The run with failures: goodput, days, date and cost, and the interval between checkpoints."""
    lines = []
    for one in found:
        head = f"with failures, {one.saves}, every {one.interval_s / 60:,.3g} min: "
        if one.goodput is None or one.days is None or one.dollars is None:
            lines.append(head + one.never)
            continue
        lines.append(
            f"{head}goodput {one.goodput[1]:.1%} ({one.goodput[0]:.1%} to {one.goodput[2]:.1%}), "
            f"{one.days[1]:,.3g} days ({one.days[0]:,.3g} to {one.days[2]:,.3g}), "
            f"${one.dollars[1]:,.0f} (${one.dollars[0]:,.0f} to ${one.dollars[2]:,.0f}); "
            f"started today it ends on {one.ends[1]} ({one.ends[0]} to {one.ends[2]})"
        )
    return "\n".join(lines)

"""The figures of a run in words: what it was, what it reached, what it cost (numpy only)."""

import math
import time
from typing import Any

import numpy as np

from megagpt.config.flops import pf_days
from megagpt.log.units import amount, duration, scientific
from megagpt.plan.beside import beside
from megagpt.report.series import Run

Rows = list[tuple[str, str]]


def facts(run: Run) -> Rows:
    """(name, value) of everything known about the run, as text."""
    rows = _configuration(run) + _result(run) + _cost(run)
    return [(name, value) for name, value in rows if value]


def headline(run: Run) -> Rows:
    """(what it is, value) of the few figures that say most about the run."""
    _, losses = run.validation
    losses = losses[np.isfinite(losses)]
    rows = [
        ("validation loss", f"{losses[-1]:.3f}" if len(losses) else ""),
        ("tokens", amount(run.tokens[-1])),
        ("parameters", amount(run.parameters[0]) if run.parameters else ""),
        ("tokens/s (median)", _known(amount, run.median("tokens_per_s"))),
        ("MFU", _known(_percent, run.median("mfu"))),
        ("wall time", duration(run.wall_s) if run.wall_s else ""),
        ("goodput", _known(_percent, run.goodput)),
    ]
    return [(name, value) for name, value in rows if value]


def count(run: Run, cause: str) -> int:
    """How many restarts, rollbacks or extensions the run had."""
    return sum(event["cause"] == cause for event in run.restarts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _known(text: Any, value: float) -> str:
    """The figure as text, nothing where it is not known."""
    return text(value) if math.isfinite(value) else ""


def _configuration(run: Run) -> Rows:
    if run.config is None:
        return []
    model, schedule, parallel = run.config.model, run.config.schedule, run.config.parallel
    total, inner = run.parameters or (0, 0)
    batch = amount(schedule.batch_tokens)
    weights = sum(source.weight for source in run.config.data.train)
    if schedule.start_tokens != schedule.batch_tokens:
        batch = f"{amount(schedule.start_tokens)} to {batch} over {amount(schedule.ramp_tokens)}"
    return [
        ("preset", run.config.preset),
        (
            "model",
            f"{model.n_layer} layers, d_model {model.d_model}, {model.n_head} heads, "
            f"n_ctx {model.n_ctx}",
        ),
        ("parameters", f"{amount(total)} ({amount(inner)} without embeddings)"),
        ("batch (tokens)", batch),
        (
            "learning rate",
            f"{scientific(schedule.peak_lr)}, warm-up {amount(schedule.warmup_tokens)} tokens, "
            f"floor {scientific(schedule.peak_lr * schedule.min_lr_ratio)}",
        ),
        ("carried by", f"{parallel.ds_config}, {parallel.dtype}"),
        ("layout", str(run.facts.get("layout", ""))),
        ("data", ", ".join(f"{s.path} ({s.weight / weights:.0%})" for s in run.config.data.train)),
        ("seed", str(run.config.seed)),
    ]


def _result(run: Run) -> Rows:
    total = f" of {amount(run.config.schedule.total_tokens)}" if run.config else ""
    loss = run.smoothed("loss")[-1]
    rows = [
        ("tokens", amount(run.tokens[-1]) + total),
        ("steps", str(int(run.steps[-1]["step"]))),
        ("training loss", f"{loss:.4f} (mean of about {run.span_steps} steps)"),
    ]
    tokens, losses = run.validation
    known = np.isfinite(losses)
    if known.any():
        last = float(losses[known][-1])
        best = int(np.nanargmin(losses))
        rows += [
            ("validation loss", f"{last:.4f}"),
            ("perplexity", f"{math.exp(min(last, 80)):.2f}"),
            ("best validation loss", f"{losses[best]:.4f} at {amount(tokens[best])} tokens"),
        ]
    bits = run.evaluations[-1].get("validation_bits_per_byte") if run.evaluations else None
    return [*rows, ("bits per byte", f"{bits:.4f}" if bits is not None else "")]


def _cost(run: Run) -> Rows:
    compute = pf_days(run.parameters[0], run.tokens[-1]) if run.parameters else math.nan
    speed = _known(amount, run.median("tokens_per_s"))
    return [
        ("throughput", f"{speed} tokens/s" if speed else ""),
        ("MFU", _known(_percent, run.median("mfu"))),
        ("compute (6 a parameter and token)", _known(lambda days: f"{days:.3g} PF-days", compute)),
        ("wall time", duration(run.wall_s) if run.wall_s else ""),
        ("goodput", _known(_percent, run.goodput)),
        ("restarts", str(count(run, "restart"))),
        ("rollbacks", str(count(run, "rollback") or "")),
        ("extensions", str(count(run, "extension") or "")),
        ("spikes", str(len(run.spikes) or "")),
        ("skipped steps", str(int(run.steps[-1].get("skipped_steps") or 0) or "")),
    ]


def beside_rows(run: Run) -> list[list[str]]:
    """One row for each item that was predicted and measured: item, both, and how far they are
    apart; empty where there is neither a plan nor a profile."""
    if run.config is None:
        return []
    rows = []
    for one in beside(run.config, run.facts, run.steps):
        ends = f" (80%: {one.ends[0]:.3g} to {one.ends[1]:.3g})" if one.ends else ""
        predicted, measured = f"{one.predicted:.3g} {one.unit}", f"{one.measured:.3g} {one.unit}"
        rows.append([one.name, predicted + ends, measured, _known(lambda x: f"{x:+.0%}", one.off)])
    return rows


def shares(run: Run) -> list[tuple[str, float]]:
    """Where the wall time went, as (name, seconds): steps that count, steps done again, time
    without a process (start-up after a restart included), evaluations, checkpoints that training
    waited for, and everything else (texts, checks, closing)."""
    if not run.wall_s:
        return []
    named = [
        ("useful steps", min(run.wall_s, float(np.nansum(run.step_s)))),
        ("steps done again", sum(event.get("lost_s", 0.0) for event in run.restarts)),
        ("down", sum(event.get("down_s", 0.0) for event in run.restarts)),
        ("evaluation", sum(line.get("evaluate_s", 0.0) for line in run.evaluations)),
        ("checkpoints", sum(event.get("stall_s", 0.0) for event in run.events)),
    ]
    named.append(("the rest", run.wall_s - sum(seconds for _, seconds in named)))
    return [(name, seconds) for name, seconds in named if seconds > 0]


def restart_rows(run: Run) -> list[list[str]]:
    """One row a restart or rollback: what, when, where, and what it cost."""
    rows = []
    for event in run.restarts:
        if event["cause"] == "extension":
            continue
        again, down, when = event.get("lost_s", 0.0), event.get("down_s", 0.0), ""
        if "time" in event:
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(event["time"]))
        steps_again = f"{event.get('lost_steps', 0)} ({amount(event.get('lost_tokens', 0))} tokens)"
        costs = [duration(again), duration(down), duration(again + down)]
        place = [event["cause"], when, str(event["step"]), amount(event["tokens"])]
        rows.append([*place, steps_again, *costs])
    return rows

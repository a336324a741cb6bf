"""What the page draws: each chart as plain data, for page.js to draw (numpy only).

A chart is a dict: title, x ("tokens" or "PF-days"), unit of y, xlog, ylog, lines and marks. A
line is name, colour, x, y, kind ("line", "faint", "dots", "step" or "dash"); a mark is a vertical
line at x with a text and a kind ("restart", "rollback" or "spike").
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megagpt.report.look import ALARM, BATCH, COLOURS, GREY, RATE, TRAIN, VALIDATION, window
from megagpt.report.reference import chinchilla, frontier, kaplan
from megagpt.report.series import PF_DAY, Floats, Run, smooth, thin

Chart = dict[str, Any]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """All charts that have something to show, the most asked for first."""
    found = [
        _loss(runs),
        _compute(runs),
        _validation_sets(runs),
        _plain(runs, "lr", "learning rate", RATE),
        _plain(runs, "batch_tokens", "batch size", BATCH, kind="step", unit="tokens"),
        _plain(runs, "tokens_per_s", "throughput", TRAIN, unit="tokens/s", smoothed=True),
        _plain(
            runs,
            "mfu",
            "model FLOPs utilization",
            VALIDATION,
            unit="MFU, %",
            scale=100.0,
            smoothed=True,
        ),
        _plain(runs, "grad_norm", "gradient norm, before clipping", ALARM, ylog=True, marked=True),
        _family(runs, "time of a step by part", "s", "_s"),
        _sources(runs),
        _family(runs, "memory of rank 0", "bytes", "_bytes"),
        _plain(runs, "loss_scale", "loss scale", GREY, kind="step", ylog=True),
    ]
    return [chart for chart in found if chart["lines"]]


def _chart(title: str, **options: Any) -> Chart:
    empty = {"x": "tokens", "unit": "", "xlog": False, "ylog": False, "lines": [], "marks": []}
    return {"title": title, **empty, "note": "", **options}


def _line(name: str, colour: str, x: Floats, y: Floats, kind: str = "line") -> dict[str, Any]:
    # What is not finite has no place on an axis: the line goes on at the next value.
    known = np.isfinite(x) & np.isfinite(y)
    x, y = thin(x[known], y[known])
    return {
        "name": name,
        "colour": colour,
        "kind": kind,
        "x": [float(f"{value:.7g}") for value in x],
        "y": [float(f"{value:.5g}") for value in y],
    }


def _coloured(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, COLOURS[index % len(COLOURS)]) for index, run in enumerate(runs)]


def _marks(run: Run) -> list[dict[str, Any]]:
    """Restarts, rollbacks and spikes along the axis of tokens."""
    marks = [
        {
            "x": event["tokens"],
            "kind": event["cause"],
            "text": f"{event['cause']} at step {event['step']}: "
            f"{event.get('lost_steps', 0)} steps again",
        }
        for event in run.restarts
    ]
    spikes = [
        {"x": spike.tokens, "kind": "spike", "text": f"spike at step {spike.step}: {spike.reason}"}
        for spike in run.spikes
    ]
    return sorted(marks + spikes, key=lambda mark: mark["x"])


def _loss(runs: Sequence[Run]) -> Chart:
    chart = _chart("loss", unit="nats per token", ylog=True)
    single = len(runs) == 1
    for run, colour in _coloured(runs):
        mean = smooth(run.column("loss"), window(run))
        at, validation = run.validation
        if single:
            chart["lines"] += [
                _line("each step", TRAIN, run.tokens, run.column("loss"), "faint"),
                _line("training", TRAIN, run.tokens, mean),
            ]
            chart["marks"] = _marks(run)
        elif len(at):
            chart["lines"].append(_line(f"{run.name}, training", colour, run.tokens, mean, "faint"))
        else:
            chart["lines"].append(_line(run.name, colour, run.tokens, mean))
        if len(at):
            name = "validation" if single else run.name
            shade = VALIDATION if single else colour
            chart["lines"].append(_line(name, shade, at, validation, "dots"))
    return chart


def _compute(runs: Sequence[Run]) -> Chart:
    """Loss over compute on log axes, with what the scaling laws say."""
    chart = _chart(
        "loss over compute",
        x="PF-days",
        unit="nats per token",
        xlog=True,
        ylog=True,
        wide=True,
        note="Compute is 6 N a token, N without the embeddings. The laws were fitted to English "
        "web text with vocabularies of 32k to 50k tokens: for other text, slopes compare and "
        "levels do not.",
    )
    reach: list[float] = []
    for run, colour in _coloured(runs):
        compute = run.pf_days
        if compute is None or run.parameters is None:
            continue
        reach += [compute[0], compute[-1]]
        mean = smooth(run.column("loss"), window(run))
        name = run.name if len(runs) > 1 else "training"
        chart["lines"].append(_line(name, colour, compute, mean))
        at, validation = run.validation
        seen = at > 0
        if seen.any():
            x = 6.0 * run.parameters[1] * at[seen] / PF_DAY
            name = f"{run.name}, validation" if len(runs) > 1 else "validation"
            shade = colour if len(runs) > 1 else VALIDATION
            chart["lines"].append(_line(name, shade, x, validation[seen], "dots"))
        if len(runs) == 1:
            chart["lines"] += _laws(run.parameters, run.tokens)
    if reach:
        x = np.geomspace(min(reach), max(reach) * 2, 40)
        y = np.array([frontier(value) for value in x])
        chart["lines"].append(_line("GPT-3 frontier 2.57 C^-0.048", GREY, x, y, "dash"))
    return chart


def _laws(parameters: tuple[int, int], tokens: Floats) -> list[dict[str, Any]]:
    """The two laws for a model of this size, where a loss of less than ln 50257 is predicted."""
    at = np.geomspace(tokens[0], tokens[-1], 60)
    laws = (
        ("Kaplan 2020 at this size", "#b7791f", [kaplan(parameters[1], d) for d in at]),
        ("Chinchilla 2022 at this size", "#0987a0", [chinchilla(parameters[0], d) for d in at]),
    )
    lines = []
    for name, colour, predicted in laws:
        y = np.array(predicted)
        x = 6.0 * parameters[1] * at / PF_DAY
        low = y < math.log(50_257)
        if low.sum() > 1:
            lines.append(_line(name, colour, x[low], y[low], "dash"))
    return lines


def _validation_sets(runs: Sequence[Run]) -> Chart:
    chart = _chart("validation loss of each set", unit="nats per token", ylog=True)
    sets = [
        (f"{run.name}, {name}" if len(runs) > 1 else name, at, loss)
        for run in runs
        for name, (at, loss) in run.validation_sets.items()
    ]
    for index, (name, at, loss) in enumerate(sets):
        chart["lines"].append(_line(name, COLOURS[index % len(COLOURS)], at, loss, "dots"))
    return chart


def _plain(
    runs: Sequence[Run],
    key: str,
    title: str,
    colour: str,
    **options: Any,
) -> Chart:
    """One figure of every run over tokens."""
    scale, kind = options.pop("scale", 1.0), options.pop("kind", "line")
    smoothed, marked = options.pop("smoothed", False), options.pop("marked", False)
    chart = _chart(title, **options)
    if marked and len(runs) == 1:
        chart["marks"] = _marks(runs[0])
    for run, shade in _coloured(runs):
        values = scale * run.column(key)
        if not np.isfinite(values).any():
            continue
        shade, name = (colour, title) if len(runs) == 1 else (shade, run.name)
        if smoothed:
            chart["lines"].append(_line(f"{name}, each step", shade, run.tokens, values, "faint"))
            values = smooth(values, window(run))
        chart["lines"].append(_line(name, shade, run.tokens, values, kind))
    return chart


def _family(runs: Sequence[Run], title: str, unit: str, ending: str) -> Chart:
    """Every figure whose name ends so, smoothed; of the first run only."""
    run = runs[0]
    chart = _chart(title + (f" ({run.name})" if len(runs) > 1 else ""), unit=unit)
    # Some figures are measured every hundred steps.
    names = {name for step in run.steps[:200] for name in step if name.endswith(ending)}
    for name in sorted(names):
        values = run.column(name)
        if name.endswith("_per_s") or not np.isfinite(values).any():
            continue
        colour = COLOURS[len(chart["lines"]) % len(COLOURS)]
        mean = smooth(values, window(run))
        shown = name.removesuffix(ending).replace("_", " ")
        chart["lines"].append(_line(shown, colour, run.tokens, mean))
    return chart


def _sources(runs: Sequence[Run]) -> Chart:
    """Epochs of each source of data; of the first run only."""
    run = runs[0]
    title = "epochs of each source" + (f" ({run.name})" if len(runs) > 1 else "")
    chart = _chart(title)
    last = run.steps[-1].get("sources")
    for index, name in enumerate(last if isinstance(last, dict) else {}):
        values = [step.get("sources", {}).get(name, {}).get("epochs") for step in run.steps]
        y = np.array([math.nan if value is None else value for value in values], dtype=float)
        if np.isfinite(y).any():
            chart["lines"].append(_line(name, COLOURS[index % len(COLOURS)], run.tokens, y))
    return chart

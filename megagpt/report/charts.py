"""What the page and the picture draw: each chart as plain data (numpy only).

A chart is a dict: title, x ("tokens" or "PF-days without embeddings"), unit of y, xlog, ylog, lines
and marks. A line is name, colour, x, y, kind ("line", "faint", "dots", "step" or "dash"); a mark is
a vertical line at x with a text and a kind ("restart", "rollback" or "spike").

The published scaling laws beside a run's loss are fits to English web text in nats per token with
vocabularies of 32k to 50k: for other text, or another tokenizer, slopes compare and levels do not.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from megagpt.config.flops import pf_days
from megagpt.report.series import Floats, Run, column, table, thin
from megagpt.use.learned import curves

INK, FAINT, GRID, GREY = "#1f2933", "#66727f", "#e6e9ed", "#8a94a0"
TRAIN, VALIDATION, RATE, BATCH, ALARM = "#2b6cb0", "#dd6b20", "#2f855a", "#6b46c1", "#c53030"
COLOURS = (TRAIN, VALIDATION, RATE, BATCH, ALARM, "#0bb5c9", "#b7791f", "#d53f8c")

LEAST_PF_DAYS, LEAST_VOCABULARY = 1e-6, 32_000
"""Where the published laws begin to apply: Kaplan et al. 2020, figure 1, and their tokenizers."""
LAWLESS = (
    "Compute is 6 N a token, N without the embeddings. The published laws are not drawn: they were "
    f"fitted to runs of {LEAST_PF_DAYS:g} PF-days or more with vocabularies of "
    f"{LEAST_VOCABULARY:,} tokens or more."
)
Chart = dict[str, Any]
Number = TypeVar("Number", float, Floats)
_FIGURES: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("lr", "learning rate", RATE, "line", {}),
    ("batch_tokens", "batch size", BATCH, "step", {"unit": "tokens"}),
    ("tokens_per_s", "throughput", TRAIN, "smooth", {"unit": "tokens/s"}),
    ("mfu", "model FLOPs utilization", VALIDATION, "smooth", {"unit": "MFU, %"}),
    ("grad_norm", "gradient norm, before clipping", ALARM, "line", {"ylog": True}),
    ("loss_scale", "loss scale", GREY, "step", {"ylog": True}),
)
"""Figures with a chart of their own: (name in the record, title, colour, kind, chart's options)."""


def frontier(pf_days: Number) -> Number:
    """Validation loss of the best model for a compute budget: L(C) = 2.57 C^-0.048, C in
    petaflop/s-days without the embeddings (GPT-3, figure 3.1)."""
    return 2.57 * pf_days**-0.048


def kaplan(n: float, tokens: Number) -> Number:
    """Loss of n parameters (without embeddings) after `tokens`, trained to the end of a schedule
    (Kaplan et al. 2020, equation 1.5 with table 2)."""
    return ((6.4e13 / n) ** (0.076 / 0.103) + 1.8e13 / tokens) ** 0.103


def chinchilla(n: float, tokens: Number) -> Number:
    """Loss of n parameters after `tokens` (Hoffmann et al. 2022, equation 10)."""
    return 1.69 + 406.4 / n**0.34 + 410.7 / tokens**0.28


def charts(runs: Sequence[Run]) -> list[Chart]:
    """All charts that have something to show, the most asked for first."""
    figures = {
        key: _figure(runs, key, title, colour, kind, options)
        for key, title, colour, kind, options in _FIGURES
    }
    loss_scale = figures.pop("loss_scale")
    candidates = [
        _loss(runs),
        _compute(runs),
        *_tasks(runs),
        _validation_sets(runs),
        *figures.values(),
        _family(runs, "time of a step by part", "s", "_s"),
        _sources(runs),
        _family(runs, "memory of rank 0", "bytes", "_bytes"),
        loss_scale,
    ]
    for chart in candidates:
        # Of a line that is finite nowhere there is nothing to draw.
        chart["lines"] = [line for line in chart["lines"] if line["x"]]
    return [chart for chart in candidates if chart["lines"]]


def colour_of(index: int) -> str:
    """The colour of the index-th of several lines or runs."""
    return COLOURS[index % len(COLOURS)]


def _chart(title: str, **options: Any) -> Chart:
    empty = {"x": "tokens", "unit": "", "xlog": False, "ylog": False, "lines": [], "marks": []}
    return {"title": title, **empty, "note": "", **options}


def _line(name: str, colour: str, x: Floats, y: Floats, kind: str = "line") -> dict[str, Any]:
    # An axis has no point for what is not finite: the line goes on at the next value.
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = thin(x[finite], y[finite])
    return {
        "name": name,
        "colour": colour,
        "kind": kind,
        "x": [float(f"{value:.7g}") for value in x],
        "y": [float(f"{value:.5g}") for value in y],
    }


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
    marks += [
        {"x": spike.tokens, "kind": "spike", "text": f"spike at step {spike.step}: {spike.reason}"}
        for spike in run.spikes
    ]
    return sorted(marks, key=lambda mark: mark["x"])


def _loss(runs: Sequence[Run]) -> Chart:
    chart = _chart("loss", unit="nats per token", ylog=True)
    if len(runs) == 1:
        [run] = runs
        chart["marks"] = _marks(run)
        chart["lines"] = [
            _line("each step", TRAIN, run.tokens, run.column("loss"), "faint"),
            _line("training", TRAIN, run.tokens, run.smoothed("loss")),
        ]
        if run.evaluations:
            chart["lines"].append(_line("validation", VALIDATION, *run.validation, "dots"))
        return chart
    for index, run in enumerate(runs):
        colour, training = colour_of(index), run.smoothed("loss")
        if run.evaluations:
            chart["lines"] += [
                _line(f"{run.name}, training", colour, run.tokens, training, "faint"),
                _line(run.name, colour, *run.validation, "dots"),
            ]
        else:
            chart["lines"].append(_line(run.name, colour, run.tokens, training))
    return chart


def _compute(runs: Sequence[Run]) -> Chart:
    """Loss over compute on log axes, with what the scaling laws say."""
    chart = _chart(
        "loss over compute",
        x="PF-days without embeddings",
        unit="nats per token",
        xlog=True,
        ylog=True,
        wide=True,
        note="Compute is 6 N a token, N without the embeddings. The laws were fitted to English "
        "web text with vocabularies of 32k to 50k tokens: for other text, slopes compare and "
        "levels do not.",
    )
    reach: list[float] = []
    lawful = [run for run in runs if _lawful(run)]
    if not lawful:
        chart["note"] = LAWLESS
    several = len(runs) > 1
    for index, run in enumerate(runs):
        compute = run.pf_days(run.tokens)
        if compute is None:
            continue
        if run in lawful:
            reach += [compute[0], compute[-1]]
        colour = colour_of(index)
        name = run.name if several else "training"
        chart["lines"].append(_line(name, colour, compute, run.smoothed("loss")))
        tokens, losses = run.validation
        # A logarithmic axis has no zero, where the first evaluation lies.
        x = run.pf_days(tokens[tokens > 0])
        if x is not None and len(x):
            name = f"{run.name}, validation" if several else "validation"
            shade = colour if several else VALIDATION
            chart["lines"].append(_line(name, shade, x, losses[tokens > 0], "dots"))
        if not several and run in lawful:
            chart["lines"] += _laws(run)
    if reach:
        x = np.geomspace(min(reach), max(reach) * 2, 40)
        chart["lines"].append(_line("GPT-3 frontier 2.57 C^-0.048", GREY, x, frontier(x), "dash"))
    return chart


def _lawful(run: Run) -> bool:
    """Whether the published laws say anything of a run: they were fitted to more compute, and to
    vocabularies of some ten thousand tokens, whose losses are nats of a longer piece of text."""
    compute = run.pf_days(run.tokens)
    if compute is None or run.config is None:
        return False
    return compute[-1] >= LEAST_PF_DAYS and run.config.model.vocab_size >= LEAST_VOCABULARY


def _laws(run: Run) -> list[dict[str, Any]]:
    """The two laws for a model of this size, where a loss of less than ln 50257 is predicted."""
    assert run.parameters is not None
    total, inner = run.parameters
    tokens = np.geomspace(run.tokens[0], run.tokens[-1], 60)
    lines = []
    for name, colour, losses in (
        ("Kaplan 2020 at this size", "#b7791f", kaplan(inner, tokens)),
        ("Chinchilla 2022 at this size", "#0bb5c9", chinchilla(total, tokens)),
    ):
        low = losses < math.log(50_257)
        if low.sum() > 1:
            x = pf_days(inner, tokens[low])
            lines.append(_line(name, colour, x, losses[low], "dash"))
    return lines


def _validation_sets(runs: Sequence[Run]) -> Chart:
    chart = _chart("validation loss of each set", unit="nats per token", ylog=True)
    for run in runs:
        for name, losses in run.validation_sets.items():
            shown = f"{run.name}, {name}" if len(runs) > 1 else name
            colour = colour_of(len(chart["lines"]))
            chart["lines"].append(_line(shown, colour, run.validation[0], losses, "dots"))
    return chart


def _tasks(runs: Sequence[Run]) -> list[Chart]:
    """What the checkpoints reached on tasks: all accuracies, and each other figure, in a chart."""
    kinds: dict[str, Chart] = {}
    for run in runs:
        for curve in curves(run.folder):
            chart = kinds.setdefault(curve.title, _chart(curve.title, unit=curve.unit))
            name = f"{run.name}, {curve.task}" if len(runs) > 1 else curve.task
            colour, x = colour_of(len(chart["lines"]) // 2), np.array(curve.tokens)
            guess = _line(f"{name}, a guess", colour, x, np.array(curve.chance), "dash")
            chart["lines"] += [_line(name, colour, x, np.array(curve.values), "dots"), guess]
    return list(kinds.values())


def _figure(
    runs: Sequence[Run], key: str, title: str, colour: str, kind: str, options: dict[str, Any]
) -> Chart:
    """One figure of every run over tokens."""
    chart = _chart(title, **options)
    scale = 100.0 if key == "mfu" else 1.0
    if key == "grad_norm" and len(runs) == 1:
        chart["marks"] = _marks(runs[0])
    for index, run in enumerate(runs):
        values = scale * run.column(key)
        if not np.isfinite(values).any():
            continue
        shade, name = (colour, title) if len(runs) == 1 else (colour_of(index), run.name)
        if kind == "smooth":
            chart["lines"] += [
                _line(f"{name}, each step", shade, run.tokens, values, "faint"),
                _line(name, shade, run.tokens, scale * run.smoothed(key)),
            ]
        else:
            chart["lines"].append(_line(name, shade, run.tokens, values, kind))
    return chart


def _shade(chart: Chart, index: int, several: bool) -> str:
    """The colour of a chart's next line: that of the run where there are several."""
    return colour_of(index if several else len(chart["lines"]))


def _family(runs: Sequence[Run], title: str, unit: str, ending: str) -> Chart:
    """Every figure of every run whose name ends so, smoothed."""
    chart, several = _chart(title, unit=unit), len(runs) > 1
    for index, run in enumerate(runs):
        # Some figures are measured every hundred steps.
        names = {name for step in run.steps[:200] for name in step if name.endswith(ending)}
        for name in sorted(names):
            if name.endswith("_per_s") or not np.isfinite(run.column(name)).any():
                continue
            shown = name.removesuffix(ending).replace("_", " ")
            shown = f"{run.name}, {shown}" if several else shown
            colour = _shade(chart, index, several)
            chart["lines"].append(_line(shown, colour, run.tokens, run.smoothed(name)))
    return chart


def _sources(runs: Sequence[Run]) -> Chart:
    """Epochs of each source of data of every run."""
    chart, several = _chart("epochs of each source"), len(runs) > 1
    for index, run in enumerate(runs):
        for name in table(run.steps[-1].get("sources")):
            of_each = (table(table(step.get("sources")).get(name)) for step in run.steps)
            epochs = column(list(of_each), "epochs")
            if np.isfinite(epochs).any():
                shown = f"{run.name}, {name}" if several else name
                colour = _shade(chart, index, several)
                chart["lines"].append(_line(shown, colour, run.tokens, epochs))
    return chart

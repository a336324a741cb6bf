"""What the page and the picture draw: each chart as plain data (numpy only).

A chart is a dict: title, x ("tokens" or "PF-days without embeddings"), unit of y, xlog, ylog, lines
and marks. A line is name, colour, run (its number), x, y, kind ("line", "faint", "dots", "step",
"dash", or "area": what is stacked upon the next line); a mark is a vertical line at x with a text,
a colour, a run and a kind ("restart", "rollback", "extension" or "spike"). A line has `over`, the
number of earlier lines that it would hide, so that it can be drawn with gaps.

Of one run a chart may show several figures; of several runs each chart shows one, a line for each
run in the run's colour.

The published scaling laws beside a run's loss are fits to English web text in nats per token with
vocabularies of 32k to 50k: for other text, or another tokenizer, slopes compare and levels do not.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from megagpt.config.flops import pf_days
from megagpt.log.units import scientific
from megagpt.report.colours import (
    ALARM,
    BATCH,
    COLOURS,
    GREY,
    PART_COLOURS,
    RATE,
    STEEP,
    TRAIN,
    VALIDATION,
    colour_of,
)
from megagpt.report.series import Floats, Run, column, parts_of, smooth, table, thin
from megagpt.use.learned import curves

LEAST_PF_DAYS, LEAST_VOCABULARY = 1e-6, 32_000
"""Where the published laws begin to apply: Kaplan et al. 2020, figure 1, and their tokenizers."""
LAWLESS = (
    "Compute is 6 N a token, N without the embeddings. The published laws are not drawn: they were "
    f"fitted to runs of {scientific(LEAST_PF_DAYS)} PF-days or more with vocabularies of "
    f"{LEAST_VOCABULARY:,} tokens or more."
)
LAWS = (
    "Compute is 6 N a token, N without the embeddings. The laws were fitted to English web text "
    "with vocabularies of 32k to 50k tokens: for other text, slopes compare and levels do not."
)
Chart = dict[str, Any]
Curve = tuple[Floats, Floats]
Number = TypeVar("Number", float, Floats)
_FIGURES: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("lr", "learning rate", RATE, "line", {}),
    ("batch_tokens", "batch size", BATCH, "step", {"unit": "tokens"}),
    ("tokens_per_s", "throughput", TRAIN, "smooth", {"unit": "tokens/s"}),
    ("mfu", "model FLOPs utilization", VALIDATION, "smooth", {"unit": "MFU, %"}),
    ("grad_norm", "gradient norm, before clipping", STEEP, "line", {"ylog": True}),
    ("loss_scale", "loss scale", GREY, "step", {"ylog": True}),
    ("step_s", "time of a step", TRAIN, "smooth", {"unit": "s"}),
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
    *figures, loss_scale, step_time = (_figure(runs, *figure) for figure in _FIGURES)
    parts = _parts(runs)
    losses = ("validation loss of each set", "validation loss of ")
    candidates = [
        _loss(runs),
        _compute(runs),
        *_tasks(runs),
        *_of_each(runs, _validation_sets, losses, "dots", unit="nats per token", ylog=True),
        *figures,
        parts if parts["lines"] else step_time,
        *_of_each(runs, _epochs, ("epochs of each source", "epochs of "), "line"),
        *_of_each(runs, _memory, ("memory of rank 0", "memory of rank 0: "), "line", unit="bytes"),
        loss_scale,
    ]
    for chart in candidates:
        # Of a line that is finite nowhere there is nothing to draw.
        chart["lines"] = [line for line in chart["lines"] if line["x"]]
        # A logarithmic axis shows nothing of figures that are all 0 or below.
        for name in "xy":
            chart[f"{name}log"] &= any(v > 0 for line in chart["lines"] for v in line[name])
        _count_hidden(chart["lines"])
    return [chart for chart in candidates if chart["lines"]]


def _chart(title: str, **options: Any) -> Chart:
    empty = {"x": "tokens", "unit": "", "xlog": False, "ylog": False, "lines": [], "marks": []}
    return {"title": title, **empty, "note": "", **options}


def _line(name: str, colour: str, curve: Curve, kind: str = "line", run: int = 0) -> dict[str, Any]:
    # An axis has no point for what is not finite: the line goes on at the next value.
    x, y = curve
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = thin(x[finite], y[finite])
    return {
        "name": name,
        "colour": colour,
        "kind": kind,
        "run": run,
        "x": [float(f"{value:.7g}") for value in x],
        "y": [float(f"{value:.5g}") for value in y],
    }


def _count_hidden(lines: Sequence[dict[str, Any]]) -> None:
    """Says of each line how many earlier ones run along it for a quarter of its way or more."""
    for number, line in enumerate(lines):
        line["over"] = 0
        if line["kind"] not in ("line", "step"):
            continue
        for other in lines[:number]:
            there = np.interp(line["x"], other["x"], other["y"])
            same = np.abs(there - line["y"]) <= 1e-3 * np.abs(line["y"])
            line["over"] += other["kind"] == line["kind"] and bool(same.mean() >= 0.25)


def _marks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Restarts, rollbacks and spikes along the axis of tokens; of several runs in their colours."""
    marks = []
    for index, run in enumerate(runs):
        for event in (*run.restarts, *run.spikes):
            kind, colour = event["cause"], GREY
            told = f"{event.get('lost_steps', 0)} steps again"
            if kind == "spike":
                told, colour = event["reason"], ALARM
            text = f"{kind} at step {event['step']}: {told}"
            if len(runs) > 1:
                text, colour = f"{run.name}: {text}", colour_of(index)
            mark = {"x": event["tokens"], "kind": kind, "colour": colour}
            marks.append(mark | {"text": text, "run": index})
    return sorted(marks, key=lambda mark: mark["x"])


def _loss(runs: Sequence[Run]) -> Chart:
    chart = _chart("loss", unit="nats per token", ylog=True, marks=_marks(runs))
    for index, run in enumerate(runs):
        colour, training = colour_of(index), (run.tokens, run.smoothed("loss"))
        lines = [(run.name, colour, training, "line")]
        if len(runs) == 1:
            lines = [
                ("each step", TRAIN, (run.tokens, run.column("loss")), "faint"),
                ("training", TRAIN, training, "line"),
                ("validation", VALIDATION, run.validation, "dots"),
            ]
        elif run.evaluations:
            lines = [
                (f"{run.name}, training", colour, training, "faint"),
                (run.name, colour, run.validation, "dots"),
            ]
        chart["lines"] += [_line(*line, index) for line in lines]
    return chart


def _compute(runs: Sequence[Run]) -> Chart:
    """Loss over compute on log axes, with what the scaling laws say."""
    lawful = [run for run in runs if _lawful(run)]
    chart = _chart(
        "loss over compute",
        x="PF-days without embeddings",
        unit="nats per token",
        xlog=True,
        ylog=True,
        wide=True,
        note=LAWS if lawful else LAWLESS,
    )
    for index, run in enumerate(runs):
        if run.parameters is None:
            continue
        for name, colour, kind, (tokens, losses) in (
            ("training", TRAIN, "line", (run.tokens, run.smoothed("loss"))),
            ("validation", VALIDATION, "dots", run.validation),
        ):
            if len(runs) > 1:
                name = run.name if kind == "line" else f"{run.name}, {name}"
                colour = colour_of(index)
            # A logarithmic axis has no zero, where the first evaluation lies.
            later = tokens > 0
            curve = run.pf_days(tokens[later]), losses[later]
            chart["lines"].append(_line(name, colour, curve, kind, index))
    if lawful:
        if len(runs) == 1:
            chart["lines"] += _laws(runs[0])
        reach = [run.pf_days(run.tokens[[0, -1]]) for run in lawful]
        x = np.geomspace(np.min(reach), np.max(reach) * 2, 40)
        chart["lines"].append(_line("GPT-3 frontier 2.57 C^-0.048", GREY, (x, frontier(x)), "dash"))
    return chart


def _lawful(run: Run) -> bool:
    """Whether the published laws say anything of a run: they were fitted to more compute, and to
    vocabularies of some ten thousand tokens, whose losses are nats of a longer piece of text."""
    if run.config is None or run.config.model.vocab_size < LEAST_VOCABULARY:
        return False
    return bool(run.pf_days(run.tokens)[-1] >= LEAST_PF_DAYS)


def _laws(run: Run) -> list[dict[str, Any]]:
    """The two laws for a model of this size, where a loss of less than ln 50257 is predicted."""
    assert run.parameters is not None
    total, inner = run.parameters
    tokens = np.geomspace(run.tokens[0], run.tokens[-1], 60)
    lines = []
    for name, colour, losses in (
        ("Kaplan 2020 at this size", COLOURS[6], kaplan(inner, tokens)),
        ("Chinchilla 2022 at this size", COLOURS[5], chinchilla(total, tokens)),
    ):
        low = losses < math.log(50_257)
        if low.sum() > 1:
            x = pf_days(inner, tokens[low])
            lines.append(_line(name, colour, (x, losses[low]), "dash"))
    return lines


def _figure(
    runs: Sequence[Run], key: str, title: str, colour: str, kind: str, options: dict[str, Any]
) -> Chart:
    """One figure of every run over tokens."""
    chart = _chart(title, marks=_marks(runs) if key == "grad_norm" else [], **options)
    scale = 100.0 if key == "mfu" else 1.0
    for index, run in enumerate(runs):
        values = scale * (run.step_s if key == "step_s" else run.column(key))
        shade, name = (colour, title) if len(runs) == 1 else (colour_of(index), run.name)
        if kind == "smooth":
            chart["lines"] += [
                _line(f"{name}, each step", shade, (run.tokens, values), "faint", index),
                _line(name, shade, (run.tokens, smooth(values, run.span_steps)), run=index),
            ]
        else:
            chart["lines"].append(_line(name, shade, (run.tokens, values), kind, index))
    return chart


# --- several figures of a kind ------------------------------------------------------------------


def _of_each(
    runs: Sequence[Run],
    curves_of: Callable[[Run], dict[str, Curve]],
    titles: tuple[str, str],
    kind: str,
    **options: Any,
) -> list[Chart]:
    """All figures of one run in a chart; of several runs a chart for each figure.

    curves_of: the figures of a run by name. titles: of the one chart, and what the figure's name
    follows in those of several.
    """
    made: dict[str, Chart] = {}
    several = len(runs) > 1
    for index, run in enumerate(runs):
        for name, curve in curves_of(run).items():
            if not np.isfinite(curve[1]).any():
                continue
            title = titles[1] + name if several else titles[0]
            lines = made.setdefault(title, _chart(title, **options))["lines"]
            shown, colour = (run.name, index) if several else (name, len(lines))
            lines.append(_line(shown, colour_of(colour), curve, kind, index))
    return list(made.values())


def _validation_sets(run: Run) -> dict[str, Curve]:
    return {name: (run.validation[0], losses) for name, losses in run.validation_sets.items()}


def _epochs(run: Run) -> dict[str, Curve]:
    """Of each source of data."""
    sources = [table(step.get("sources")) for step in run.steps]
    return {
        name: (run.tokens, column([table(of_step.get(name)) for of_step in sources], "epochs"))
        for name in sources[-1]
    }


def _memory(run: Run) -> dict[str, Curve]:
    # Some figures are measured every hundred steps.
    names = {name for step in run.steps[:200] for name in step if name.endswith("_bytes")}
    return {
        name.removesuffix("_bytes").replace("_", " "): (run.tokens, run.smoothed(name))
        for name in sorted(names)
    }


def _parts(runs: Sequence[Run]) -> Chart:
    """The parts of a step of one run upon one another: together they are the step."""
    note = "Together the parts are the step; click a name to take it out of the stack."
    chart = _chart("time of a step by part", unit="s", note=note)
    for run in runs if len(runs) == 1 else ():
        for name, seconds in reversed(parts_of(run).items()):
            line = _line(name, PART_COLOURS[name], (run.tokens, seconds), "area")
            chart["lines"].append(line)
    return chart


def _tasks(runs: Sequence[Run]) -> list[Chart]:
    """What the checkpoints reached on tasks: of one run all accuracies, and each other figure, in a
    chart; of several runs a chart for each task."""
    kinds: dict[str, Chart] = {}
    several = len(runs) > 1
    for index, run in enumerate(runs):
        for curve in curves(run.folder):
            title = f"{curve.title}: {curve.task}" if several else curve.title
            chart = kinds.setdefault(title, _chart(title, unit=curve.unit))
            name = run.name if several else curve.task
            colour, x = colour_of(index if several else len(chart["lines"]) // 2), curve.tokens
            for shown, values, kind in (
                (name, curve.values, "dots"),
                (f"{name}, a guess", curve.chance, "dash"),
            ):
                line = _line(shown, colour, (np.array(x), np.array(values)), kind, index)
                chart["lines"].append(line)
    return list(kinds.values())

"""report.html: one self-contained page, charts that answer the pointer, and the run's table.

page.html is its template, page.js draws the charts with uPlot, whose files are in uplot/ with their
licence. Everything goes into the one file, and its security policy forbids it to load more.
"""

import base64
import json
import re
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined

from megagpt.errors import visible
from megagpt.files import write_file
from megagpt.log.units import amount, duration
from megagpt.report.charts import charts
from megagpt.report.colours import PART_COLOURS, colour_of, style, variable
from megagpt.report.series import Run, parts_of, thin
from megagpt.report.table import Rows, beside_rows, facts, headline, restart_rows, shares

_FOLDER = Path(__file__).parent

MOST_FILES = 6
"""Evaluations of a run whose texts are shown: the first, the last and some between."""
MOST_CHARACTERS = 4000
"""Of one text file."""
MOST_BYTES = 1_000_000
"""Of one image, which the page holds; a larger one is left out."""


def write_page(runs: Sequence[Run], path: Path) -> Path:
    """Writes the page of `runs` to `path` and returns it; the page loads nothing from elsewhere."""
    made = [(run, samples(run)) for run in runs]
    usual = _usual_step(runs) if len(runs) > 1 else []
    licence = f"/*\n{_text('uplot/LICENSE')}*/\n"
    page = _template().render(
        runs=runs,
        several=len(runs) > 1,
        title=_title([run.name for run in runs]),
        under=_period(runs),
        style=_text("uplot/uPlot.min.css") + style() + _text("page.css"),
        headlines=_side_by_side(runs, headline),
        samples=made,
        images=any(sample.png for _, written in made for sample in written),
        facts=_side_by_side(runs, facts),
        predicted=[[run.name, *row] for run in runs for row in beside_rows(run)],
        goodput=[(run.name, parts) for run in runs if (parts := dict(shares(run)))],
        steps=[(name, parts) for name, parts in usual if parts],
        longest=max((sum(parts.values()) for _, parts in usual), default=0.0),
        restarts=[[run.name, *row] for run in runs for row in restart_rows(run)],
        configurations=_configurations(runs),
        data=script_data({"charts": charts(runs), "runs": [_axes(run) for run in runs]}),
        script=licence + _text("uplot/uPlot.iife.min.js") + _text("page.js"),
    )
    write_file(path, page)
    return path


def _template() -> Any:
    """page.html, with what it writes colours and numbers by."""
    # What Jinja escapes is of effect in a page, `visible` spells out what is on a terminal.
    made = Environment(autoescape=True, undefined=StrictUndefined, finalize=_spelled_out)
    made.filters |= {"variable": variable, "colour_of": colour_of, "amount": amount}
    made.filters |= {"seconds": _seconds, "base64": lambda data: base64.b64encode(data).decode()}
    made.globals["part_colours"] = PART_COLOURS
    return made.from_string(_text("page.html"))


def _spelled_out(value: Any) -> Any:
    # A str alone: what the template has made of texts is a subclass, and is escaped already.
    return visible(value) if type(value) is str else value


def script_data(value: object) -> str:
    """A value as JSON within a script element, which every "<" could end or open anew."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _title(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _period(runs: Sequence[Run]) -> str:
    times = [moment for run in runs for moment in run.times or ()]
    if not times:
        return "megagpt"
    first, last = (
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(moment)) for moment in (min(times), max(times))
    )
    return f"megagpt, {first} to {last} UTC"


def _side_by_side(runs: Sequence[Run], rows_of: Callable[[Run], Rows]) -> dict[str, list[str]]:
    """Name -> its value for each run, "" where a run has none."""
    columns = [dict(rows_of(run)) for run in runs]
    names = dict.fromkeys(chain(*columns))
    return {name: [column.get(name, "") for column in columns] for name in names}


def _axes(run: Run) -> dict[str, object]:
    """By which tokens become steps and hours: the same rows of each, the run's begin first."""
    axes = {"tokens": run.tokens, "steps": run.column("step"), "hours": run.hours}
    columns = {
        name: [0.0, *(float(f"{value:.7g}") for value in thin(run.tokens, values)[1])]
        for name, values in axes.items()
        if values is not None
    }
    return {"name": run.name, **columns}


def _seconds(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{amount(seconds)} s"


def _usual_step(runs: Sequence[Run]) -> list[tuple[str, dict[str, float]]]:
    """The median seconds of each part of a step of each run: what the chart of one run shows over
    its tokens."""
    usual = []
    for run in runs:
        medians = {name: float(np.nanmedian(of)) for name, of in parts_of(run).items()}
        parts = {name: seconds for name, seconds in medians.items() if seconds > 0}
        usual.append((run.name, parts))
    return usual


class Written(NamedTuple):
    """What was made at one evaluation: texts, or images in one picture."""

    step: int
    tokens: float | None
    """Consumed by then; None where the record does not tell."""
    text: str
    png: bytes


def samples(run: Run) -> list[Written]:
    """What a run made, the latest first; none where it made none."""
    found = {}
    for path in sorted((run.folder / "samples").glob("step_*")):
        match = re.fullmatch(r"step_(\d+)\.(txt|png)", path.name)
        small = path.suffix == ".txt" or path.stat().st_size <= MOST_BYTES
        if match and path.is_file() and small:
            found[int(match[1])] = path
    steps = sorted((step for step in found if step <= run.steps[-1]["step"]), reverse=True)
    if len(steps) > MOST_FILES:
        last = len(steps) - 1
        steps = [steps[number * last // (MOST_FILES - 1)] for number in range(MOST_FILES)]
    tokens = {line["step"]: line["tokens"] for line in [*run.steps, *run.evaluations]}
    return [_read(found[step], step, tokens.get(step)) for step in steps]


def _read(path: Path, step: int, tokens: float | None) -> Written:
    content = path.read_bytes()
    if path.suffix == ".png":
        return Written(step, tokens, "", content)
    text = content.decode("utf-8", errors="replace").rstrip("\n")
    more = " ..." if len(text) > MOST_CHARACTERS else ""
    return Written(step, tokens, text[:MOST_CHARACTERS] + more, b"")


def _configurations(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The name and the text of the configuration of each run that has one."""
    paths = [(run.name, run.folder / "config.toml") for run in runs]
    return [
        (f"{name}/config.toml", path.read_text(encoding="utf-8", errors="surrogateescape"))
        for name, path in paths
        if path.is_file()
    ]

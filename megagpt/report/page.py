"""report.html: one self-contained page, charts that answer the pointer, and the run's table.

page.html is the frame, page.js draws the charts with uPlot, whose files are in uplot/ with their
licence. Everything goes into the one file, and its security policy forbids it to load more.
"""

import base64
import html
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from megagpt.errors import visible
from megagpt.files import write_file
from megagpt.log.units import amount, duration
from megagpt.report.charts import charts
from megagpt.report.colours import PART_COLOURS, colour_of, style, variable
from megagpt.report.series import Run, parts_of, thin
from megagpt.report.table import beside_rows, facts, headline, restart_rows, shares

_FOLDER = Path(__file__).parent
_BESIDE = ("run", "item", "predicted", "measured", "difference")
_RESTARTS = "run,what,when,at step,at tokens,steps again,their time,time down,cost".split(",")

MOST_FILES = 6
"""Evaluations of a run whose texts are shown: the first, the last and some between."""
MOST_CHARACTERS = 4000
"""Of one text file."""
MOST_BYTES = 1_000_000
"""Of one image, which the page holds; a larger one is left out."""


def write_page(runs: Sequence[Run], path: Path) -> Path:
    """Writes the page of `runs` to `path` and returns it; the page loads nothing from elsewhere."""
    licence = f"/*\n{_text('uplot/LICENSE')}*/\n"
    page = Template(_text("page.html")).substitute(
        title=escape(_title([run.name for run in runs])),
        under=escape(_period(runs)),
        style=_text("uplot/uPlot.min.css") + style() + _text("page.css"),
        tiles=_tiles(runs[0]) if len(runs) == 1 else _heads(runs),
        tables="\n".join(part(runs) for part in _PARTS),
        data=script_data({"charts": charts(runs), "runs": [_axes(run) for run in runs]}),
        script=licence + _text("uplot/uPlot.iife.min.js") + _text("page.js"),
    )
    write_file(path, page)
    return path


def escape(text: str) -> str:
    """A text as it stands in the page, in an element or in the value of an attribute."""
    return html.escape(visible(text))


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


def _tiles(run: Run) -> str:
    tiles = (
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for name, value in headline(run)
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _heads(runs: Sequence[Run]) -> str:
    """The tiles of several runs: a row for each, which is also the key to the colours."""
    columns = [dict(headline(run)) for run in runs]
    names = dict.fromkeys(chain(*columns))
    rows = (
        f"<tr>{head}{_cells(column.get(name, '') for name in names)}</tr>"
        for head, column in zip(_names(runs), columns, strict=True)
    )
    return f'<div class="card scroll heads">{_table(["", *names], rows)}</div>'


def _axes(run: Run) -> dict[str, object]:
    """By which tokens become steps and hours: the same rows of each, the run's begin first."""
    axes = {"tokens": run.tokens, "steps": run.column("step"), "hours": run.hours}
    columns = {
        name: [0.0, *(float(f"{value:.7g}") for value in thin(run.tokens, values)[1])]
        for name, values in axes.items()
        if values is not None
    }
    return {"name": run.name, **columns}


def _square(colour: str) -> str:
    return f'<span style="color:var({variable(colour)})">&#9632;</span>'


def _card(title: str, content: str) -> str:
    """A titled part of the page, nothing where it has no content."""
    return f'<h2>{title}</h2><div class="card scroll">{content}</div>' if content else ""


def _table(names: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _names(runs: Sequence[Run]) -> list[str]:
    """The runs with their colours, as heads of a table's columns or rows."""
    return [
        f"<th>{_square(colour_of(index))} {escape(run.name)}</th>" for index, run in enumerate(runs)
    ]


def _facts(runs: Sequence[Run]) -> str:
    columns = [dict(facts(run)) for run in runs]
    head = f"<tr><th></th>{''.join(_names(runs))}</tr>" if len(runs) > 1 else ""
    rows = (
        f"<tr><th>{escape(name)}</th>{_cells(column.get(name, '') for column in columns)}</tr>"
        for name in dict.fromkeys(chain(*columns))
    )
    title = "The run" if len(runs) == 1 else "The runs"
    return _card(title, f"<table>{head}{''.join(rows)}</table>")


def _bar(parts: Mapping[str, float], longest: float) -> str:
    """Seconds by name side by side, as long as their share of the longest bar; below it what they
    are."""
    bar = key = ""
    total = sum(parts.values())
    for name, seconds in parts.items():
        text = escape(f"{name} {_seconds(seconds)} ({100 * seconds / total:.1f}%)")
        size = (
            f"width:{100 * seconds / longest:.4f}%;background:var({variable(PART_COLOURS[name])})"
        )
        bar += f'<div title="{text}" style="{size}"></div>'
        key += f"<span>{_square(PART_COLOURS[name])} {text}</span>"
    return f'<div class="bar">{bar}</div><div class="key">{key}</div>'


def _seconds(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{amount(seconds)} s"


def _bars(
    title: str, runs: Sequence[Run], of_runs: Sequence[Mapping[str, float]], longest: float = 0.0
) -> str:
    """A bar for each run that has parts; without the `longest` all are of one length."""
    content = ""
    for run, parts in zip(runs, of_runs, strict=True):
        if parts:
            name = f"<b>{escape(run.name)}</b>" if len(runs) > 1 else ""
            content += name + _bar(parts, longest or sum(parts.values()))
    return _card(title, content)


def _goodput(runs: Sequence[Run]) -> str:
    """A bar for each run, divided by what its wall time was used for."""
    return _bars("Where the wall time went", runs, [dict(shares(run)) for run in runs])


def _steps(runs: Sequence[Run]) -> str:
    """Of several runs a bar for each, as long as its usual step and divided by parts: what the
    chart of one run shows over its tokens."""
    if len(runs) == 1:
        return ""
    usual = []
    for run in runs:
        medians = {name: float(np.nanmedian(of)) for name, of in parts_of(run).items()}
        usual.append({name: seconds for name, seconds in medians.items() if seconds > 0})
    longest = max(sum(parts.values()) for parts in usual)
    return _bars("Where the time of a step goes (medians)", runs, usual, longest)


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


def _texts(runs: Sequence[Run]) -> str:
    """What each model made at its evaluations; the latest is open."""
    content, title = "", "Texts that the model wrote"
    for run in runs:
        for number, sample in enumerate(samples(run)):
            at = f", {amount(sample.tokens)} tokens" if sample.tokens is not None else ""
            name = escape(f"{run.name}, step {sample.step}{at}")
            opened = "" if number else " open"
            made = f"<pre>{escape(sample.text)}</pre>"
            if sample.png:
                title = "Images that the model made"
                data = base64.b64encode(sample.png).decode()
                made = f'<img alt="{name}" src="data:image/png;base64,{data}">'
            content += f"<details{opened}><summary>{name}</summary>{made}</details>"
    return _card(title, content)


def _listed(
    title: str, names: Sequence[str], rows_of: Callable[[Run], list[list[str]]], runs: Sequence[Run]
) -> str:
    """A table of the rows of all runs, if there are any."""
    rows = [f"<tr>{_cells([run.name, *row])}</tr>" for run in runs for row in rows_of(run)]
    return _card(title, _table(names, rows) if rows else "")


_predicted = partial(_listed, "Predicted beside measured", _BESIDE, beside_rows)
_restarts = partial(_listed, "What the restarts cost", _RESTARTS, restart_rows)


def _configurations(runs: Sequence[Run]) -> str:
    content = ""
    for run in runs:
        path = run.folder / "config.toml"
        if path.is_file():
            text = escape(path.read_text(encoding="utf-8", errors="surrogateescape"))
            name = escape(f"{run.name}/config.toml")
            content += f"<details><summary>{name}</summary><pre>{text}</pre></details>"
    return _card("Configuration", content)


_PARTS = (_texts, _facts, _predicted, _goodput, _steps, _restarts, _configurations)
"""The tables of the page, in their order."""

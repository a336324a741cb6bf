"""report.html: one self-contained page, charts that answer the pointer, and the run's table.

page.html is the frame, page.js draws the charts with uPlot, whose files are in uplot/ with their
licence. Everything goes into the one file, and its security policy forbids it to load more.
"""

import base64
import html
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

import numpy as np

from megagpt.errors import visible
from megagpt.files import write_file
from megagpt.log.units import amount, duration
from megagpt.report.charts import charts
from megagpt.report.colours import ALARM, COLOURS, GREY, PART_COLOURS, colour_of, style, variable
from megagpt.report.series import Floats, Run, parts_of, thin
from megagpt.report.table import beside_rows, facts, headline, restart_rows, shares
from megagpt.report.written import samples

_FOLDER = Path(__file__).parent
_SHARE_COLOURS = {
    "useful steps": COLOURS[2],
    "steps done again": COLOURS[1],
    "down": ALARM,
    "evaluation": COLOURS[0],
    "checkpoints": COLOURS[5],
    "the rest": GREY,
}
_BESIDE = ("run", "item", "predicted", "measured", "difference")
_RESTARTS = "run,what,when,at step,at tokens,steps again,their time,time down,cost".split(",")


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
    names = dict.fromkeys(name for column in columns for name in column)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = (
        f"<tr><th>{_square(colour_of(index))} {escape(run.name)}</th>"
        f"{_cells(column.get(name, '') for name in names)}</tr>"
        for index, (run, column) in enumerate(zip(runs, columns, strict=True))
    )
    return f'<div class="card scroll heads">{_table(f"<tr><th></th>{head}</tr>", rows)}</div>'


def _axes(run: Run) -> dict[str, object]:
    """By which tokens become steps and hours: the same rows of each, the run's begin first."""
    steps, hours = run.column("step"), run.hours
    of_each = {"steps": steps} if hours is None else {"steps": steps, "hours": hours}
    axes: dict[str, object] = {"name": run.name, "tokens": _column(run.tokens, run.tokens)}
    return axes | {name: _column(run.tokens, values) for name, values in of_each.items()}


def _column(tokens: Floats, values: Floats) -> list[float]:
    return [0.0, *(float(f"{value:.7g}") for value in thin(tokens, values)[1])]


def _square(colour: str) -> str:
    return f'<span style="color:var({variable(colour)})">&#9632;</span>'


def _card(title: str, content: str) -> str:
    """A titled part of the page, nothing where it has no content."""
    return f'<h2>{title}</h2><div class="card scroll">{content}</div>' if content else ""


def _table(head: str, rows: Iterable[str]) -> str:
    return f"<table>{head}{''.join(rows)}</table>"


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _facts(runs: Sequence[Run]) -> str:
    columns = [dict(facts(run)) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    heads = (
        f"<th>{_square(colour_of(index))} {escape(run.name)}</th>" for index, run in enumerate(runs)
    )
    head = f"<tr><th></th>{''.join(heads)}</tr>" if len(runs) > 1 else ""
    rows = (
        f"<tr><th>{escape(name)}</th>{_cells(column.get(name, '') for column in columns)}</tr>"
        for name in names
    )
    return _card("The run" if len(runs) == 1 else "The runs", _table(head, rows))


def _bar(named: Sequence[tuple[str, float, str]], of: float) -> str:
    """(name, seconds, colour) side by side, as long as their share `of` so many seconds; below it
    what they are."""
    bar = key = ""
    total = sum(seconds for _, seconds, _ in named)
    for name, seconds, colour in named:
        text = escape(f"{name} {_seconds(seconds)} ({100 * seconds / total:.1f}%)")
        size = f"width:{100 * seconds / of:.4f}%;background:var({variable(colour)})"
        bar += f'<div title="{text}" style="{size}"></div>'
        key += f"<span>{_square(colour)} {text}</span>"
    return f'<div class="bar">{bar}</div><div class="key">{key}</div>'


def _seconds(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{amount(seconds)} s"


def _titled(run: Run, runs: Sequence[Run]) -> str:
    return f"<b>{escape(run.name)}</b>" if len(runs) > 1 else ""


def _goodput(runs: Sequence[Run]) -> str:
    """A bar for each run, divided by what its wall time was used for."""
    content = ""
    for run in runs:
        named = [(name, seconds, _SHARE_COLOURS[name]) for name, seconds in shares(run)]
        if named:
            total = sum(seconds for _, seconds, _ in named)
            content += _titled(run, runs) + _bar(named, total)
    return _card("Where the wall time went", content)


def _steps(runs: Sequence[Run]) -> str:
    """Of several runs a bar for each, as long as its usual step and divided by parts: what the
    chart of one run shows over its tokens."""
    if len(runs) == 1:
        return ""
    usual = []
    for run in runs:
        medians = {name: float(np.nanmedian(of)) for name, of in parts_of(run).items()}
        usual.append([(name, s, PART_COLOURS[name]) for name, s in medians.items() if s > 0])
    longest = max(sum(seconds for _, seconds, _ in parts) for parts in usual)
    content = "".join(
        _titled(run, runs) + _bar(parts, longest)
        for run, parts in zip(runs, usual, strict=True)
        if parts
    )
    return _card("Where the time of a step goes (medians)", content)


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


def _predicted(runs: Sequence[Run]) -> str:
    rows = [f"<tr>{_cells([run.name, *row])}</tr>" for run in runs for row in beside_rows(run)]
    head = "".join(f"<th>{name}</th>" for name in _BESIDE)
    return _card("Predicted beside measured", _table(f"<tr>{head}</tr>", rows) if rows else "")


def _restarts(runs: Sequence[Run]) -> str:
    rows = [f"<tr>{_cells([run.name, *row])}</tr>" for run in runs for row in restart_rows(run)]
    head = "".join(f"<th>{name}</th>" for name in _RESTARTS)
    return _card("What the restarts cost", _table(f"<tr>{head}</tr>", rows) if rows else "")


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

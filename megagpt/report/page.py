"""report.html: one self-contained page, charts that answer the pointer, and the run's table.

page.html is the frame, page.js draws the charts with uPlot, whose files lie in uplot/ with their
licence. Everything goes into the one file, and its security policy forbids it to load more.
"""

import html
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from megagpt.errors import visible
from megagpt.log.units import duration
from megagpt.report.charts import charts, colour_of
from megagpt.report.series import Run
from megagpt.report.table import beside_rows, facts, headline, restart_rows, shares

_FOLDER = Path(__file__).parent
_SHARE_COLOURS = {
    "useful steps": "#2f855a",
    "steps done again": "#dd6b20",
    "down": "#c53030",
    "evaluation": "#2b6cb0",
    "checkpoints": "#6b46c1",
    "the rest": "#a0aec0",
}
_BESIDE = ("run", "item", "predicted", "measured", "difference")
_RESTARTS = "run,what,when,at step,at tokens,steps again,their time,time down,cost".split(",")


def write_page(runs: Sequence[Run], path: Path) -> Path:
    """Writes the page of `runs` to `path` and returns it; the page loads nothing from elsewhere."""
    licence = f"/*\n{_text('uplot/LICENSE')}*/\n"
    page = Template(_text("page.html")).substitute(
        title=escape(" and ".join(run.name for run in runs)),
        under=escape(_period(runs)),
        style=_text("uplot/uPlot.min.css") + _text("page.css"),
        tiles=_tiles(runs[0]) if len(runs) == 1 else "",
        tables="\n".join(part(runs) for part in _PARTS),
        data=script_data(charts(runs)),
        script=licence + _text("uplot/uPlot.iife.min.js") + _text("page.js"),
    )
    path.write_text(page, encoding="utf-8")
    return path


def escape(text: str) -> str:
    """A text as it stands in the page, in an element or in the value of an attribute."""
    return html.escape(visible(text))


def script_data(value: object) -> str:
    """A value as JSON within a script element, which every "<" could end or open anew."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


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
        f'<th style="color:{colour_of(index)}">{escape(run.name)}</th>'
        for index, run in enumerate(runs)
    )
    head = f"<tr><th></th>{''.join(heads)}</tr>" if len(runs) > 1 else ""
    rows = (
        f"<tr><th>{escape(name)}</th>{_cells(column.get(name, '') for column in columns)}</tr>"
        for name in names
    )
    return _card("The run" if len(runs) == 1 else "The runs", _table(head, rows))


def _goodput(runs: Sequence[Run]) -> str:
    """A bar for each run, divided by what its wall time was used for."""
    content = ""
    for run in runs:
        bar = key = ""
        named = shares(run)
        total = sum(seconds for _, seconds in named)
        for name, seconds in named:
            share, colour = seconds / total, _SHARE_COLOURS[name]
            text = f"{name} {duration(seconds)} ({100 * share:.1f}%)"
            bar += f'<div title="{text}" style="flex:{share:.6f};background:{colour}"></div>'
            key += f'<span><span style="color:{colour}">&#9632;</span> {text}</span>'
        if named:
            content += f"<b>{escape(run.name)}</b>" if len(runs) > 1 else ""
            content += f'<div class="bar">{bar}</div><div class="key">{key}</div>'
    return _card("Where the wall time went", content)


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


_PARTS = (_facts, _predicted, _goodput, _restarts, _configurations)
"""The tables of the page, in their order."""

"""report.html: one self-contained page, charts that answer the pointer, and the run's table."""

import json
import math
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from megagpt.log.units import amount, duration
from megagpt.report.charts import charts
from megagpt.report.look import COLOURS
from megagpt.report.series import Run
from megagpt.report.table import facts, restart_rows, shares

_HERE = Path(__file__).parent
_SHARE_COLOURS = {
    "useful steps": "#2f855a",
    "steps done again": "#dd6b20",
    "down": "#c53030",
    "evaluation": "#2b6cb0",
    "checkpoints": "#6b46c1",
    "the rest": "#a0aec0",
}


def write_page(runs: Sequence[Run], path: Path) -> Path:
    """Writes the page of `runs` to `path` and returns it; the page loads nothing from elsewhere."""
    title = runs[0].name if len(runs) == 1 else " and ".join(run.name for run in runs)
    # "</" would end the script element wherever it stands.
    data = json.dumps(charts(runs), separators=(",", ":")).replace("</", "<\\/")
    path.write_text(
        "\n".join(
            [
                "<!doctype html>",
                '<html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(title)}</title>",
                f"<style>\n{(_HERE / 'page.css').read_text()}</style></head><body><main>",
                f"<h1>{escape(title)}</h1>",
                f'<p class="under">{escape(_under(runs))}</p>',
                _tiles(runs[0]) if len(runs) == 1 else "",
                '<div class="charts" id="charts"></div>',
                _table(runs),
                _goodput(runs),
                _restarts(runs),
                _configurations(runs),
                f'<script type="application/json" id="data">{data}</script>',
                f"<script>\n{(_HERE / 'page.js').read_text()}</script>",
                "</main></body></html>",
                "",
            ]
        ),
        encoding="utf-8",
    )
    return path


def _under(runs: Sequence[Run]) -> str:
    times = [line["time"] for run in runs for line in [*run.events, *run.steps] if "time" in line]
    if not times:
        return "megagpt"
    first, last = (
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(value)) for value in (min(times), max(times))
    )
    return f"megagpt, {first} to {last} UTC"


def _tiles(run: Run) -> str:
    _, validation = run.validation
    known = validation[np.isfinite(validation)]
    speeds = run.column("tokens_per_s")
    tiles = [
        (f"{known[-1]:.3f}", "validation loss") if len(known) else None,
        (amount(run.tokens[-1]), "tokens"),
        (amount(run.parameters[0]), "parameters") if run.parameters else None,
        (amount(float(np.nanmedian(speeds))), "tokens/s (median)")
        if np.isfinite(speeds).any()
        else None,
        (duration(run.wall_s), "wall time") if run.wall_s else None,
        (f"{100 * run.goodput:.1f}%", "goodput") if math.isfinite(run.goodput) else None,
    ]
    shown = (tile for tile in tiles if tile)
    return '<div class="tiles">{}</div>'.format(
        "".join(
            f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in shown
        )
    )


def _table(runs: Sequence[Run]) -> str:
    columns = [dict(facts(run)) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    head = ""
    if len(runs) > 1:
        cells = "".join(
            f'<th style="color:{COLOURS[i % len(COLOURS)]}">{escape(run.name)}</th>'
            for i, run in enumerate(runs)
        )
        head = f"<tr><th></th>{cells}</tr>"
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{escape(column.get(name, ''))}</td>" for column in columns)
        + "</tr>"
        for name in names
    )
    return f'<h2>The run</h2><div class="card scroll"><table>{head}{rows}</table></div>'


def _goodput(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        named = shares(run)
        total = sum(seconds for _, seconds in named)
        if not total:
            continue
        bar = "".join(
            f'<div title="{name}: {duration(seconds)}" '
            f'style="flex:{seconds / total:.6f};background:{_SHARE_COLOURS[name]}"></div>'
            for name, seconds in named
        )
        key = "".join(
            f'<span><span style="color:{_SHARE_COLOURS[name]}">&#9632;</span> {name} '
            f"{duration(seconds)} ({100 * seconds / total:.1f}%)</span>"
            for name, seconds in named
        )
        label = f"<b>{escape(run.name)}</b>" if len(runs) > 1 else ""
        parts.append(f'{label}<div class="bar">{bar}</div><div class="key">{key}</div>')
    if not parts:
        return ""
    return f'<h2>Where the wall time went</h2><div class="card">{"".join(parts)}</div>'


def _restarts(runs: Sequence[Run]) -> str:
    rows = [[run.name, *row] for run in runs for row in restart_rows(run)]
    if not rows:
        return ""
    head = ["run", "what", "when", "at step", "at tokens", "steps again", "their time"]
    head += ["time down", "cost"]
    cells = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        '<h2>What the restarts cost</h2><div class="card scroll">'
        f"<table><tr>{cells}</tr>{body}</table></div>"
    )


def _configurations(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        path = run.folder / "config.toml"
        if path.is_file():
            text = escape(path.read_text(encoding="utf-8", errors="replace"))
            name = escape(run.name)
            parts.append(
                f"<details><summary>{name}/config.toml</summary><pre>{text}</pre></details>"
            )
    return f'<h2>Configuration</h2><div class="card">{"".join(parts)}</div>' if parts else ""

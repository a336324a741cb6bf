"""What the GPT-3 paper reports for its eight sizes, and what that is at another amount of compute.

Brown et al. 2020; compute is table D.1's. A value between two sizes is on the straight line over
the logarithm of compute. Nothing is said beyond the ends. Where a row has one value alone it is
that of 175B. A figure with a question mark was written down from memory; the others were checked
against another source.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.tasks.scoring import TaskResult
from megagpt.use.evaluate import Estimate

SIZES = ("125M", "350M", "760M", "1.3B", "2.7B", "6.7B", "13B", "175B")
PF_DAYS = (2.60, 7.42, 15.8, 27.5, 55.2, 139.0, 268.0, 3640.0)

TABLE = Path(__file__).with_name("gpt3.txt")
"""Lines of: task or task/figure, setting, accuracy in % (or the figure) by size."""


PAPER: dict[str, dict[str, list[str]]] = {}
"""Task -> setting -> its figures for the eight sizes, or for 175B alone, as in TABLE; the setting
of the paper's comparison by size comes first."""
for _name, _setting, *_values in map(str.split, TABLE.read_text().splitlines()):
    PAPER.setdefault(_name, {})[_setting] = _values
PAPER_SETTINGS = {0: "zero-shot", 1: "one-shot"}
"""By examples before a question; more are few-shot."""


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A task beside the paper."""

    task: str
    setting: str
    """Of the paper's figures: that of our own, where the paper's are at hand."""
    ours: float
    """Accuracies in %, NaN where there is none."""
    low: float
    high: float
    chance: float
    same_compute: float
    """The paper's at our compute; NaN where our compute is none of the paper's, or not known."""
    paper: dict[str, float]
    """By size."""
    unchecked: list[str]
    """Sizes whose figure is from memory."""
    other_setting: bool
    """Whether our own had another number of examples before a question than the paper's."""


def at_compute(values: Sequence[float], pf_days: float) -> float:
    """The value of eight at so many PF-days; NaN outside of what the paper trained."""
    if len(values) != len(SIZES) or not PF_DAYS[0] <= pf_days <= PF_DAYS[-1]:
        return math.nan
    return float(np.interp(math.log(pf_days), np.log(PF_DAYS), values))


def paper_rows(results: list[TaskResult], pf_days: float) -> list[PaperRow]:
    """A row for each task of the paper, ours where there is a result; results of other tasks are
    left out. pf_days: NaN where our compute is not known."""
    ours = {result.task: result for result in results}
    return [_row(name, ours.get(name.partition("/")[0]), pf_days) for name in PAPER]


def _row(name: str, result: TaskResult | None, pf_days: float) -> PaperRow:
    settings, figure = PAPER[name], name.partition("/")[2]
    setting = next(iter(settings))
    own = setting if result is None else PAPER_SETTINGS.get(max(result.shots), "few-shot")
    setting = own if own in settings else setting
    known = settings[setting]
    scale = 1.0 if figure else 100.0
    one, chance = Estimate(math.nan, math.nan, math.nan), math.nan
    if result is not None:
        one = result.figures[figure or result.headline]
        chance = math.nan if figure else scale * result.chance
    sizes = SIZES[len(SIZES) - len(known) :]
    values = [float(value.rstrip("?")) for value in known]
    return PaperRow(
        task=name,
        setting=setting,
        ours=scale * one.value,
        low=scale * one.low,
        high=scale * one.high,
        chance=chance,
        same_compute=at_compute(values, pf_days),
        paper=dict(zip(sizes, values, strict=True)),
        unchecked=[size for size, value in zip(sizes, known, strict=True) if value.endswith("?")],
        other_setting=own != setting,
    )


def paper_lines(rows: list[PaperRow], pf_days: float) -> list[str]:
    """The table for people."""
    lines = ["GPT-3's tasks, accuracy in %: ours, the paper's at our compute, the paper's by size"]
    if math.isnan(pf_days):
        lines.append("our compute is not known (imported weights): no value at our compute")
    elif not PF_DAYS[0] <= pf_days <= PF_DAYS[-1]:
        side = "below" if pf_days < PF_DAYS[0] else "beyond"
        lines.append(
            f"our compute, {pf_days:.2g} PF-days, is {side} the paper's {PF_DAYS[0]:g} to "
            f"{PF_DAYS[-1]:g}: no value at our compute"
        )
    else:
        lines.append(f"our compute: {pf_days:.3g} PF-days")
    lines.append("? from memory, not checked against another source; * ours had another K")
    head = f"{'task':<26}{'setting':<11}{'ours':>7}{'95%':>15}{'chance':>8}{'same':>7}"
    lines.append(head + "".join(f"{size:>7}" for size in SIZES))
    for row in rows:
        interval = "" if math.isnan(row.low) else f"{row.low:.1f} to {row.high:.1f}"
        doubt = "?" if not math.isnan(row.same_compute) and _doubtful(row, pf_days) else ""
        cells = "".join(
            f"{_shown(row.paper.get(size, math.nan)) + '?' * (size in row.unchecked):>7}"
            for size in SIZES
        )
        setting = row.setting + "*" * row.other_setting
        lines.append(
            f"{row.task:<26}{setting:<11}{_shown(row.ours):>7}{interval:>15}"
            f"{_shown(row.chance):>8}{_shown(row.same_compute) + doubt:>7}{cells}"
        )
    return lines


def _doubtful(row: PaperRow, pf_days: float) -> bool:
    """Whether a figure from memory stands at an end of the line that our compute is on."""
    place = max(1, bisect_left(PF_DAYS, pf_days))
    return bool({*SIZES[place - 1 : place + 1]}.intersection(row.unchecked))


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"

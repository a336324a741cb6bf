"""What the GPT-3 paper reports for its eight sizes, and what that is at another amount of compute.

Brown et al. 2020; compute is table D.1's. A value between two sizes is on the straight line over
the logarithm of compute. Nothing is said beyond the ends. Where a row has one value alone it is
that of 175B; a row without any is a task of the paper whose figure is not at hand. Checked against
another source are those of LAMBADA, HellaSwag, PIQA and Winogrande from 1.3B on, and of the sums at
175B; the others were written down from memory.
"""

import math
from dataclasses import dataclass

from megagpt.tasks.scoring import TaskResult

SIZES = ("125M", "350M", "760M", "1.3B", "2.7B", "6.7B", "13B", "175B")
PF_DAYS = (2.60, 7.42, 15.8, 27.5, 55.2, 139.0, 268.0, 3640.0)

_TABLE = """
lambada        zero-shot 42.7 54.3 60.4 63.6 67.1 70.3 72.5 76.2
hellaswag      zero-shot 33.7 43.6 51.0 54.7 62.8 67.4 70.9 78.9
piqa           zero-shot 64.6 70.2 72.9 75.1 75.6 78.0 78.5 81.0
arc_easy       zero-shot 43.6 46.5 53.0 53.8 58.2 60.2 63.8 68.8
arc_challenge  zero-shot 26.6 29.5 31.8 35.5 38.0 41.4 43.7 51.4
winogrande     zero-shot 52.0 52.1 57.4 58.7 62.3 64.5 67.9 70.2
storycloze     zero-shot 63.3 68.5 72.4 73.4 77.2 77.7 79.5 83.2
two_digit_addition       few-shot 2.0 4.1 3.5 4.5 8.9 11.9 55.5 100.0
two_digit_subtraction    few-shot 98.9
three_digit_addition     few-shot 80.4
three_digit_subtraction  few-shot 94.2
four_digit_addition      few-shot
four_digit_subtraction   few-shot
five_digit_addition      few-shot
five_digit_subtraction   few-shot
two_digit_multiplication few-shot 29.2
single_digit_three_ops   few-shot 21.3
cycle_letters_in_word    few-shot 37.9
mid_word_1_anagrams      few-shot 15.1
mid_word_2_anagrams      few-shot 39.7
random_insertion_in_word few-shot 67.2
reversed_words           few-shot 0.44
"""
"""Task, setting, accuracy in % by size."""


def _read(table: str) -> dict[str, tuple[str, tuple[float, ...]]]:
    rows = (line.split() for line in table.strip().splitlines())
    return {name: (setting, tuple(map(float, values))) for name, setting, *values in rows}


PAPER = _read(_TABLE)
"""Task -> (setting, accuracy in % of the eight sizes, of 175B alone, or of none)."""


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A task beside the paper."""

    task: str
    setting: str
    ours: float
    """Accuracies in %, NaN where there is none."""
    low: float
    high: float
    chance: float
    same_compute: float
    """The paper's at our compute; NaN where our compute is none of the paper's, or not known."""
    paper: dict[str, float]
    """By size."""


def at_compute(values: tuple[float, ...], pf_days: float) -> float:
    """The value of eight at so many PF-days; NaN outside of what the paper trained."""
    if len(values) != len(SIZES) or not PF_DAYS[0] <= pf_days <= PF_DAYS[-1]:
        return math.nan
    for place in range(1, len(SIZES)):
        if pf_days <= PF_DAYS[place]:
            break
    low, high = math.log(PF_DAYS[place - 1]), math.log(PF_DAYS[place])
    share = (math.log(pf_days) - low) / (high - low)
    return values[place - 1] + share * (values[place] - values[place - 1])


def paper_rows(results: list[TaskResult], pf_days: float) -> list[PaperRow]:
    """A row for each task of the paper, ours where there is a result; results of other tasks are
    left out. pf_days: NaN where our compute is not known."""
    ours = {result.task: result for result in results}
    rows = []
    for name, (setting, values) in PAPER.items():
        result = ours.get(name)
        if result is None:
            figure = chance = math.nan
            low = high = math.nan
        else:
            one = result.figures[result.headline]
            figure, low, high = (100 * value for value in (one.value, one.low, one.high))
            chance = 100 * result.chance
        rows.append(
            PaperRow(
                task=name,
                setting=setting,
                ours=figure,
                low=low,
                high=high,
                chance=chance,
                same_compute=at_compute(values, pf_days),
                paper=dict(zip(SIZES[len(SIZES) - len(values) :], values, strict=True)),
            )
        )
    return rows


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
    head = f"{'task':<26}{'ours':>7}{'95%':>15}{'chance':>8}{'same':>7}"
    lines.append(head + "".join(f"{size:>6}" for size in SIZES))
    for row in rows:
        interval = "" if math.isnan(row.low) else f"{row.low:.1f} to {row.high:.1f}"
        cells = "".join(f"{_shown(row.paper.get(size, math.nan)):>6}" for size in SIZES)
        lines.append(
            f"{row.task:<26}{_shown(row.ours):>7}{interval:>15}{_shown(row.chance):>8}"
            f"{_shown(row.same_compute):>7}{cells}"
        )
    return lines


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"

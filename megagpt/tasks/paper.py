"""What the GPT-3 paper reports for its eight sizes, and what that is at another amount of compute.

Brown et al. 2020; compute is table D.1's. A value between two sizes is on the straight line over
the logarithm of compute. Nothing is said beyond the ends. Where a row has one value alone it is
that of 175B. A figure with a question mark was written down from memory; the others were checked
against another source.
"""

import math
from dataclasses import dataclass

from megagpt.tasks.scoring import TaskResult
from megagpt.use.evaluate import Estimate

SIZES = ("125M", "350M", "760M", "1.3B", "2.7B", "6.7B", "13B", "175B")
PF_DAYS = (2.60, 7.42, 15.8, 27.5, 55.2, 139.0, 268.0, 3640.0)

_TABLE = """
lambada            zero-shot 42.7? 54.3? 60.4? 63.6 67.1 70.3 72.5 76.2
lambada/perplexity zero-shot 18.6? 9.09? 6.53? 5.44 4.60 4.00 3.56 3.00
hellaswag          zero-shot 33.7? 43.6? 51.0? 54.7 62.8 67.4 70.9 78.9
piqa               zero-shot 64.6? 70.2? 72.9? 75.1 75.6 78.0 78.5 81.0
arc_easy           zero-shot 43.6? 46.5? 53.0? 53.8? 58.2? 60.2? 63.8? 68.8?
arc_challenge      zero-shot 26.6? 29.5? 31.8? 35.5? 38.0? 41.4? 43.7? 51.4?
winogrande         zero-shot 52.0? 52.1? 57.4? 58.7 62.3 64.5 67.9 70.2
storycloze         zero-shot 63.3? 68.5? 72.4? 73.4? 77.2? 77.7? 79.5? 83.2
two_digit_addition       few-shot 2.0? 4.1? 3.5? 4.5? 8.9? 11.9? 55.5? 100.0
two_digit_subtraction    few-shot 98.9
three_digit_addition     few-shot 80.4
three_digit_subtraction  few-shot 94.2
four_digit_addition      few-shot 25.5
four_digit_subtraction   few-shot 26.8
five_digit_addition      few-shot 9.3
five_digit_subtraction   few-shot 9.9
two_digit_multiplication few-shot 29.2
single_digit_three_ops   few-shot 21.3
cycle_letters_in_word    few-shot 37.9?
mid_word_1_anagrams      few-shot 15.1?
mid_word_2_anagrams      few-shot 39.7?
random_insertion_in_word few-shot 67.2?
reversed_words           few-shot 0.44?
two_digit_addition       one-shot 99.6?
two_digit_subtraction    one-shot 86.4?
three_digit_addition     one-shot 65.5?
three_digit_subtraction  one-shot 78.7?
four_digit_addition      one-shot 14.0?
four_digit_subtraction   one-shot 14.0?
five_digit_addition      one-shot 3.5?
five_digit_subtraction   one-shot 3.8?
two_digit_multiplication one-shot 27.4?
single_digit_three_ops   one-shot 14.3?
cycle_letters_in_word    one-shot 21.7?
mid_word_1_anagrams      one-shot 8.62?
mid_word_2_anagrams      one-shot 25.9?
random_insertion_in_word one-shot 45.4?
reversed_words           one-shot 0.48?
two_digit_addition       zero-shot 76.9?
two_digit_subtraction    zero-shot 58.0?
three_digit_addition     zero-shot 34.2?
three_digit_subtraction  zero-shot 48.3?
four_digit_addition      zero-shot 4.0?
four_digit_subtraction   zero-shot 7.5?
five_digit_addition      zero-shot 0.7?
five_digit_subtraction   zero-shot 0.8?
two_digit_multiplication zero-shot 19.8?
single_digit_three_ops   zero-shot 9.8?
cycle_letters_in_word    zero-shot 3.66?
mid_word_1_anagrams      zero-shot 2.28?
mid_word_2_anagrams      zero-shot 8.91?
random_insertion_in_word zero-shot 8.26?
reversed_words           zero-shot 0.09?
"""
"""Task or task/figure, setting, accuracy in % (or the figure) by size."""


@dataclass(frozen=True, slots=True)
class PaperFigure:
    """A number of the paper."""

    value: float
    checked: bool
    """Whether it was compared with another source; otherwise it is from memory."""


def _read(table: str) -> dict[str, dict[str, tuple[PaperFigure, ...]]]:
    found: dict[str, dict[str, tuple[PaperFigure, ...]]] = {}
    for name, setting, *values in (line.split() for line in table.strip().splitlines()):
        made = (PaperFigure(float(v.rstrip("?")), not v.endswith("?")) for v in values)
        found.setdefault(name, {})[setting] = tuple(made)
    return found


PAPER = _read(_TABLE)
"""Task -> setting -> its figures for the eight sizes, or for 175B alone; the setting of the paper's
comparison by size comes first."""
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
    return PaperRow(
        task=name,
        setting=setting,
        ours=scale * one.value,
        low=scale * one.low,
        high=scale * one.high,
        chance=chance,
        same_compute=at_compute(tuple(value.value for value in known), pf_days),
        paper={size: value.value for size, value in zip(sizes, known, strict=True)},
        unchecked=[size for size, value in zip(sizes, known, strict=True) if not value.checked],
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
    place = next(i for i in range(1, len(SIZES)) if pf_days <= PF_DAYS[i])
    return bool({SIZES[place - 1], SIZES[place]}.intersection(row.unchecked))


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"

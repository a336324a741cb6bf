"""Texts that a model wrote during its run, as RUN_DIR/samples keeps them (stdlib only)."""

import re
from typing import NamedTuple

from megagpt.report.series import Run

MOST_FILES = 6
"""Evaluations of a run whose texts are shown: the first, the last and some between."""
MOST_CHARACTERS = 4000
"""Of one file."""


class Written(NamedTuple):
    """The texts of one evaluation."""

    step: int
    tokens: float | None
    """Consumed by then; None where the record does not tell."""
    text: str


def samples(run: Run) -> list[Written]:
    """The texts of a run, the latest first; none where it wrote none."""
    found = {}
    for path in (run.folder / "samples").glob("step_*.txt"):
        if (match := re.fullmatch(r"step_(\d+)\.txt", path.name)) and path.is_file():
            found[int(match[1])] = path
    steps = sorted((step for step in found if step <= run.steps[-1]["step"]), reverse=True)
    if len(steps) > MOST_FILES:
        last = len(steps) - 1
        steps = [steps[number * last // (MOST_FILES - 1)] for number in range(MOST_FILES)]
    tokens = {line["step"]: line["tokens"] for line in [*run.steps, *run.evaluations]}
    return [Written(step, tokens.get(step), _text(found[step].read_bytes())) for step in steps]


def _text(content: bytes) -> str:
    text = content.decode("utf-8", errors="replace").rstrip("\n")
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."

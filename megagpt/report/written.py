"""Texts or images that a model made during its run, as RUN_DIR/samples keeps them (stdlib only)."""

import re
from pathlib import Path
from typing import NamedTuple

from megagpt.report.series import Run

MOST_FILES = 6
"""Evaluations of a run whose texts are shown: the first, the last and some between."""
MOST_CHARACTERS = 4000
"""Of one text file."""
MOST_BYTES = 1_000_000
"""Of one image, which the page holds; a larger one is left out."""


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

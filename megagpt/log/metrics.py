"""metrics.jsonl: one JSON object a line, and the only record of a run that others compute from.

Three kinds of line: a step (has "loss"), an evaluation (has "validation_loss") and an event (has
"event": a start, a restart, a checkpoint). Floats are written so that they read back bit for
bit; NaN and the infinities, which JSON lacks, as the strings "NaN", "Infinity" and "-Infinity".
A line is one write to the file, so a kill leaves at most one broken line, the last. The file is
flushed to the disk before a checkpoint counts, so that a power cut takes no step that was saved.
"""

import heapq
import json
import logging
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.errors import DamageError, UsageError
from megagpt.files import copy_aside, displaced, sync_folder, whole_file

NAME = "metrics.jsonl"
log = logging.getLogger("megagpt.log")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NUMBERS = frozenset(
    "step tokens time samples loss validation_loss lr batch_tokens tokens_per_s step_s mfu "
    "skipped_steps lost_steps lost_tokens lost_s down_s paused_s stall_s save_s evaluate_s".split()
)
"""Figures that are numbers wherever they stand; others may be null."""
_PLACES = frozenset("step tokens time samples".split())
"""Numbers that say where in a run a line stands."""
_LAST_TIME = 1e11
"""The year 5138, in seconds since 1970."""
Place = tuple[int, bool]
"""Where a line of a step or an evaluation stands: (step, whether it is an evaluation)."""
Restore = Callable[[Callable[[Place], bool]], Mapping[Place, Mapping[str, Any]]]
"""Which places are wanted -> the records that another record of the run has of them, in order."""


def place_of(record: Mapping[str, Any]) -> Place:
    """The place of a step or an evaluation."""
    return record.get("step", 0), "loss" not in record


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value in JSON's own containers, every number and text in it changed."""
    if isinstance(value, Mapping):
        return {str(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return change(value)


def _python(leaf: Any) -> Any:
    return leaf.item() if hasattr(leaf, "item") else leaf


def plain(value: Any) -> Any:
    """The value in JSON's own types; scalars of numpy and torch become Python's."""
    return _mapped(value, _python)


def _named(leaf: Any) -> Any:
    """A leaf in JSON's own types, a float that JSON lacks by its name."""
    leaf = _python(leaf)
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return "NaN" if math.isnan(leaf) else ("Infinity" if leaf > 0 else "-Infinity")
    return leaf


def encode(record: Mapping[str, Any]) -> bytes:
    """One line, newline included."""
    return json.dumps(_mapped(record, _named), allow_nan=False, default=str).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The record of one line; raises ValueError when the line is not a whole JSON object, or a
    figure that all readers take for a number is none."""
    try:
        record = json.loads(line, object_hook=_with_numbers)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    for key in _NUMBERS & record.keys():
        if type(record[key]) not in (int, float):
            raise ValueError(f"{key} is no number")
    for key in _PLACES & record.keys():
        if not 0 <= record[key] < 2**63 or (key == "time" and record[key] > _LAST_TIME):
            raise ValueError(f"{key} is nowhere in a run")
    return record


def _with_numbers(record: dict[str, Any]) -> dict[str, Any]:
    """The object with the floats that JSON lacks in place of their names."""
    for key, value in record.items():
        if isinstance(value, str):
            record[key] = _NON_FINITE.get(value, value)
    return record


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """(line number, bytes, record) of each line; the record is None when the line is broken."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # A last line without its newline may be cut inside a number: 12 of 123.
                yield number, line, decode(line) if line.endswith(b"\n") else None
            except ValueError:
                yield number, line, None


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All records of the run in `folder`, in the order of the file.

    A broken last line is what a kill leaves: it is left out. Raises UsageError when the folder
    has no metrics.jsonl, DamageError for a broken line anywhere else.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise UsageError(
            f"{path}: not found. Expected a run folder, the `output` of a run file that has been "
            "trained for at least one step"
        )
    records: list[dict[str, Any]] = []
    broken = 0
    for number, _, record in _lines(path):
        if broken:
            raise DamageError(
                f"{path}, line {broken}: not a JSON object. Only the last line may be broken "
                "(a run that was killed); restore the file, or start the run again: it drops the "
                "line and keeps a copy of the file"
            )
        if record is None:
            broken = number
        else:
            records.append(record)
    return records


class Cut(NamedTuple):
    """What cut() found."""

    dropped: list[dict[str, Any]]
    """Records of steps that are trained again."""
    last_time: float | None
    """Time of the last whole line in seconds since 1970; None where there is none."""
    restored: str = ""
    """Steps whose line was lost and written again, as "3-5, 9"; "": none."""
    missing: str = ""
    """Steps up to the one where the run goes on that have no line."""
    aside: str = ""
    """Where the file as it was is kept, since lines in it were broken; "": none but the last."""


def cut(path: Path, resume_step: int, restore: Restore = lambda wanted: {}) -> Cut:
    """Drop from the file, which may be missing, the lines of steps after `resume_step`.

    At 0 the run begins anew, and its first evaluation goes too: it is made again. Events stay,
    whatever their step: they are the run's history. Broken lines go; where more than the last is
    broken, as no kill leaves it, a copy of the file is kept. Where lines are lost `restore` is
    asked for them. The file is replaced in one rename, and left untouched when nothing changes.
    """
    dropped: list[dict[str, Any]] = []
    broken: list[int] = []
    kept: list[tuple[Place, tuple[int, int]]] = []
    end, last, last_time, place = 0, 0, None, (0, False)
    path.touch()
    for number, line, record in _lines(path):
        start, end, last = end, end + len(line), number
        if record is None:
            broken.append(number)
            continue
        last_time = record.get("time", last_time)
        if "event" in record:
            kept.append((place, (start, end)))
        elif 0 < resume_step >= record.get("step", 0):
            kept.append((place := place_of(record), (start, end)))
        else:
            dropped.append(record)
    there = {place for place, _ in kept}
    missing = [step for step in range(1, resume_step + 1) if (step, False) not in there]
    aside = copy_aside(path) if broken and broken != [last] else ""
    if aside:
        log.error("%s: lines %s are broken; the file as it was is %s", path, spans(broken), aside)
    found: Mapping[Place, Mapping[str, Any]] = {}
    if missing or aside:
        found = restore(lambda place: place[0] <= resume_step and place not in there)
    if broken or dropped or found:
        _write_anew(path, kept, found)
    restored = spans([step for step in missing if (step, False) in found])
    lost = spans([step for step in missing if (step, False) not in found])
    if restored:
        log.warning("%s: steps %s had no line; written again, with 7 digits", path, restored)
    if lost:
        log.error("%s: steps %s have no line and will be missing", path, lost)
    return Cut(dropped, last_time, restored, lost, str(aside))


def _write_anew(
    path: Path,
    kept: Sequence[tuple[Place, tuple[int, int]]],
    found: Mapping[Place, Mapping[str, Any]],
) -> None:
    """Writes the file anew: of what it holds these stretches of bytes, and the records found."""
    more = ((place, encode(record)) for place, record in found.items())
    with path.open("rb") as old, whole_file(path) as new:
        for _, line in heapq.merge(kept, more, key=operator.itemgetter(0)):
            if not isinstance(line, bytes):
                old.seek(line[0])
                line = old.read(line[1] - line[0])
            new.write(line)


def spans(numbers: Sequence[int]) -> str:
    """Numbers in order as their stretches: 3-5, 9."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in found)


class MetricsFile:
    """metrics.jsonl open for appending, one unbuffered write a line."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, path.open("ab", buffering=0)
        sync_folder(path.parent)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. Raises OSError when not all of it can be written."""
        data = memoryview(encode(record))
        # The last bytes of a full disk take a part of the line, and only the next write fails.
        while data:
            data = data[self._file.write(data) :]

    def sync(self) -> None:
        """Returns once every line is on the disk."""
        os.fsync(self._file.fileno())

    def displaced(self) -> bool:
        """Whether what is written is lost, since the name is no longer this file's."""
        return displaced(self.path, self._file.fileno())

    def close(self) -> None:
        """Close the file, on disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

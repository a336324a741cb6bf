"""metrics.jsonl: one JSON object a line, and the only record of a run that others compute from.

Three kinds of line: a step (has "loss"), an evaluation (has "validation_loss") and an event (has
"event": a start, a restart, a checkpoint). Floats are written so that they read back bit for
bit; NaN and the infinities, which JSON lacks, as the strings "NaN", "Infinity" and "-Infinity".
A line is one write to the file, so a kill leaves at most one broken line, the last. The file is
flushed to the disk before a checkpoint counts, so that a power cut takes no step that was saved.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.errors import DamageError, UsageError
from megagpt.files import copy_aside, displaced, sync_folder

NAME = "metrics.jsonl"
log = logging.getLogger("megagpt.log")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NUMBERS = frozenset(
    "step tokens time samples loss validation_loss lr batch_tokens tokens_per_s step_s mfu "
    "skipped_steps lost_steps lost_tokens lost_s down_s stall_s evaluate_s".split()
)
"""Figures that are numbers wherever they stand; others may be null."""
_PLACES = frozenset("step tokens time samples".split())
"""Numbers that say where in a run a line stands."""
_LAST_TIME = 1e11
"""The year 5138, in seconds since 1970."""


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value in JSON's own containers, every number and text in it changed."""
    if isinstance(value, Mapping):
        return {str(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return change(value)


def plain(value: Any) -> Any:
    """The value in JSON's own types; scalars of numpy and torch become Python's."""
    return _mapped(value, lambda leaf: leaf.item() if hasattr(leaf, "item") else leaf)


def _named(leaf: Any) -> Any:
    """A float that JSON lacks by its name."""
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return "NaN" if math.isnan(leaf) else ("Infinity" if leaf > 0 else "-Infinity")
    return leaf


def encode(record: Mapping[str, Any]) -> bytes:
    """One line, newline included."""
    named = _mapped(plain(record), _named)
    return json.dumps(named, allow_nan=False, default=str).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The record of one line; raises ValueError when the line is not a whole JSON object, or a
    figure that all readers take for a number is none."""
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    record = {key: _number(value) for key, value in record.items()}
    for key in _NUMBERS & record.keys():
        if type(record[key]) not in (int, float):
            raise ValueError(f"{key} is no number")
    for key in _PLACES & record.keys():
        if not 0 <= record[key] < 2**63 or (key == "time" and record[key] > _LAST_TIME):
            raise ValueError(f"{key} is nowhere in a run")
    return record


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


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
    missing: str
    """Steps up to the one where the run goes on that have no line, as "3-5, 9"; "": none."""
    aside: str
    """Where the file as it was is kept, since lines in it were broken; "": none but the last."""


def cut(path: Path, resume_step: int) -> Cut:
    """Drop from the file, which may be missing, the lines of steps after `resume_step`.

    At 0 the run begins anew, and its first evaluation goes too: it is made again. Events stay,
    whatever their step: they are the run's history. Broken lines go; where more than the last is
    broken, as no kill leaves it, a copy of the file is kept. The file is replaced in one rename,
    and left untouched when nothing has to go.
    """
    dropped: list[dict[str, Any]] = []
    broken, last, last_time = [], 0, None
    missing = set(range(1, resume_step + 1))
    temporary = path.with_name(path.name + ".tmp")
    path.touch()
    with temporary.open("wb") as out:
        for number, line, record in _lines(path):
            last = number
            if record is None:
                broken.append(number)
                continue
            last_time = record.get("time", last_time)
            after = resume_step == 0 or record.get("step", 0) > resume_step
            if "loss" in record:
                missing.discard(record.get("step", 0))
            if "event" not in record and after:
                dropped.append(record)
            else:
                out.write(line)
        out.flush()
        os.fsync(out.fileno())
    aside = str(copy_aside(path)) if broken and broken != [last] else ""
    if broken or dropped:
        os.replace(temporary, path)
    else:
        temporary.unlink()
    if aside:
        log.error("%s: lines %s are broken; the file as it was is %s", path, spans(broken), aside)
    if missing:
        log.error("%s: steps %s have no line and will be missing", path, spans(sorted(missing)))
    return Cut(dropped, last_time, spans(sorted(missing)), aside)


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

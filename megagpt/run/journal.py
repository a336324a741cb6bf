"""RUN/journal.jsonl: what was decided about spikes, so that runs replay (L2).

An entry says one of two things. With `skipped_samples`: the run went back to `step`, and every
step after it reads its samples so much further on. Without: the update of `step` was left out.
Where a run reads and which steps it leaves out is then a pure function of the step and the
journal; resuming, or training the run anew beside the same journal, takes the same steps.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.errors import DamageError, MegagptError

NAME = "journal.jsonl"
UPDATE_SKIPPED = "left out"
MOST_ROLLBACKS = 3
"""To the same checkpoint: beyond, skipping data does not help."""
Entry = tuple[int, int | None]
"""(step, samples skipped altogether by every step after it), or (step left out, None)."""


@dataclass(frozen=True, slots=True)
class Journal:
    """What was decided in one run, in the order in which it happened."""

    entries: tuple[Entry, ...] = ()

    @property
    def holding(self) -> list[Entry]:
        """What holds of the run as it now is: after a rollback, later entries never happened."""
        found: list[Entry] = []
        for step, samples in self.entries:
            if samples is not None:
                # A rollback to the step itself keeps its update, done or left out.
                found = [e for e in found if e[0] < step or (e[0] == step and e[1] is None)]
            found.append((step, samples))
        return found

    def skipped_samples(self, step: int) -> int:
        """Samples skipped altogether before the step that follows `step` steps."""
        samples = (n for at, n in self.holding if n is not None and at <= step)
        return max(samples, default=0)

    def skips_update(self, step: int) -> bool:
        """Whether the update of this step, counted from 1, was left out."""
        return (step, None) in self.holding

    def skip_update(self, step: int) -> "Journal":
        """The journal once the update of this step is skipped."""
        return Journal((*self.entries, (step, None)))

    def add(self, step: int, skipped_samples: int) -> "Journal":
        """The journal once the run goes back to `step` and skips so many samples altogether from
        there on. Raises MegagptError when it went back there MOST_ROLLBACKS times before."""
        if sum(at == step and n is not None for at, n in self.entries) >= MOST_ROLLBACKS:
            raise MegagptError(
                f"the loss or gradient spikes again after {MOST_ROLLBACKS} rollbacks to step "
                f"{step}; lower schedule.peak_lr (with --allow-changes), or move the newest "
                f"checkpoint and {NAME} away to go further back"
            )
        return Journal((*self.entries, (step, skipped_samples)))

    def write(self, run: Path, **facts: object) -> None:
        """Appends the newest entry to the run's file, flushed to the disk. One rank calls it.

        A file that is gone (the entries then come from a checkpoint) gets the earlier ones back.
        """
        path = run / NAME
        there, earlier = b"", _text(self.entries[:-1])
        if path.exists():
            there, earlier = path.read_bytes(), b""
        with path.open("ab") as file:
            # What a kill has left of a line would spoil this one.
            file.truncate(there.rfind(b"\n") + 1)
            file.write(earlier + _text(self.entries[-1:], **facts))
            file.flush()
            os.fsync(file.fileno())


def _text(entries: Iterable[Entry], **facts: object) -> bytes:
    return "".join(json.dumps(_line(entry) | facts) + "\n" for entry in entries).encode()


def _line(entry: Entry) -> dict[str, object]:
    step, samples = entry
    if samples is None:
        return {"step": step, "update": UPDATE_SKIPPED}
    return {"step": step, "skipped_samples": samples}


def _entry(line: dict[str, Any]) -> Entry:
    """The entry of a line; raises KeyError, TypeError or ValueError for what is none."""
    if line.get("update") == UPDATE_SKIPPED:
        return int(line["step"]), None
    return int(line["step"]), int(line["skipped_samples"])


def read_journal(run: Path) -> Journal:
    """The journal of the run's file, empty where there is none.

    Raises DamageError for a line that is no entry; only the last may be cut short (by a kill).
    """
    try:
        lines = (run / NAME).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return Journal()
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            entries.append(_entry(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamageError(
                f"{run / NAME}, line {number}: not an entry of the journal; it decides which "
                "samples are read and which steps are left out, so restore the file from a copy"
            ) from None
    return Journal(tuple(entries))

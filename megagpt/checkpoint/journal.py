"""RUN/journal.jsonl: what was decided about spikes, so that runs replay (L2).

An entry says one of two things. With `skipped_samples`: the run went back to `step`, and every
step after it reads its samples so much further on. Without: the update of `step` was left out.
Where a run reads and which steps it leaves out is then a pure function of the step and the
journal; resuming, or training the run anew beside the same journal, takes the same steps.

Every line carries the sha256 of its other keys, and a checkpoint a copy of the entries so far
(see `agree`), so that no line is believed unread. Lines of November 2026 or before carry none.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.errors import DamageError, MegagptError
from megagpt.files import sync_folder

NAME = "journal.jsonl"
UPDATE_SKIPPED = "left out"
MOST_ROLLBACKS = 3
"""To the same checkpoint: beyond, skipping data does not help."""
KEYS = {"step", "update", "skipped_samples", "reason", "spiked_step", "sha256"}
"""What a line may hold."""
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

    def agree(self, sealed: Sequence[Sequence[int | None]], run: Path) -> "Journal":
        """The run's journal, by its file and the copy in the checkpoint that it goes on from.

        Where the file is gone or empty the copy counts. Raises DamageError when the file does not
        begin as the copy does.
        """
        copy = tuple((int(step or 0), samples) for step, samples in sealed)
        if not self.entries:
            return Journal(copy)
        for number, entry in enumerate(copy):
            if self.entries[number : number + 1] != (entry,):
                raise DamageError(
                    f"{run / NAME}: entry {number + 1} is not the one that the checkpoint holds, "
                    f"{json.dumps(_line(entry))}; restore the file, or move it away: then the "
                    "checkpoint's copy is used"
                )
        return self

    def write(self, run: Path, **facts: object) -> None:
        """Appends the newest entry to the run's file, flushed to the disk. One rank calls it.

        A file that is gone or holds no entry (they then come from a checkpoint) gets the earlier
        ones back.
        """
        path = run / NAME
        whole = (path.read_bytes() if path.exists() else b"").rfind(b"\n") + 1
        earlier = b"" if whole else _text(self.entries[:-1])
        with path.open("ab") as file:
            # What a kill has left of a line would spoil this one.
            file.truncate(whole)
            file.write(earlier + _text(self.entries[-1:], **facts))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(run)


def _text(entries: Iterable[Entry], **facts: object) -> bytes:
    return b"".join(_sealed(_line(entry) | facts) + b"\n" for entry in entries)


def _sealed(line: dict[str, object]) -> bytes:
    """The one text of a line."""
    digest = hashlib.sha256(json.dumps(line).encode()).hexdigest()
    return json.dumps(line | {"sha256": digest}).encode()


def _line(entry: Entry) -> dict[str, object]:
    step, samples = entry
    if samples is None:
        return {"step": step, "update": UPDATE_SKIPPED}
    return {"step": step, "skipped_samples": samples}


def _entry(text: bytes) -> Entry:
    """The entry of a line; raises KeyError, TypeError or ValueError for what is none."""
    line: dict[str, Any] = json.loads(text)
    if line.keys() - KEYS:
        raise ValueError("a key that no entry has")
    if line.pop("sha256", None) and _sealed(line) != text:
        raise ValueError("its checksum is not that of its content")
    if line.get("update") == UPDATE_SKIPPED:
        return int(line["step"]), None
    return int(line["step"]), int(line["skipped_samples"])


def _overgrown(rest: bytes) -> bool:
    """Whether what follows the last line's end is a whole entry and more: then it was not cut
    short, but its end has changed."""
    text = rest.decode(errors="replace")
    try:
        return json.JSONDecoder().raw_decode(text)[1] < len(text)
    except ValueError:
        return False


def read_journal(run: Path) -> Journal:
    """The journal of the run's file, empty where there is none.

    Raises DamageError for a line that is no entry; only the last may be cut short (by a kill).
    """
    try:
        *lines, rest = (run / NAME).read_bytes().split(b"\n")
    except FileNotFoundError:
        return Journal()
    entries: list[Entry] = []
    for number, line in enumerate([*lines, rest] if _overgrown(rest) else lines, 1):
        try:
            entries.append(_entry(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamageError(
                f"{run / NAME}, line {number}: not an entry of the journal; it decides which "
                "samples are read and which steps are left out, so restore the file from a copy"
            ) from None
    return Journal(tuple(entries))


def journal_problems(run: Path, sealed: Sequence[Sequence[int | None]] | None) -> list[str]:
    """What is wrong with the run's file: by itself, or beside the copy of its newest whole
    checkpoint, where there is one; empty when a run can go on by it."""
    try:
        read_journal(run).agree(sealed or (), run)
    except DamageError as error:
        return [str(error)]
    return []

"""RUN/journal.jsonl: which samples were skipped after which step, so that runs replay (L2).

An entry says: the run went back to `step`, and every step after it reads its samples
`skipped_samples` further on. Where a run reads is then a pure function of the step and the
journal; resuming, or training the run anew beside the same journal, takes the same steps.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from megagpt.errors import DamageError, MegagptError

NAME = "journal.jsonl"
MOST_ROLLBACKS = 3
"""To the same checkpoint: beyond, skipping data does not help."""
Skip = tuple[int, int]
"""(steps done, samples skipped altogether by every step after them)."""


class Journal:
    """The rollbacks of one run, in the order in which they happened."""

    def __init__(self, entries: Iterable[Sequence[int]] = ()) -> None:
        self.entries: list[Skip] = [(int(step), int(samples)) for step, samples in entries]

    @property
    def skips(self) -> list[Skip]:
        """What holds of the run as it now is: after a rollback, later skips never happened."""
        found: list[Skip] = []
        for entry in self.entries:
            found = [skip for skip in found if skip[0] < entry[0]] + [entry]
        return found

    def skipped(self, step: int) -> int:
        """Samples skipped altogether before the step that follows `step` steps."""
        return max((samples for at, samples in self.skips if at <= step), default=0)

    def add(self, step: int, skipped_samples: int) -> None:
        """The run goes back to `step` and skips so many samples altogether from there on.

        Raises MegagptError when it went back there MOST_ROLLBACKS times before.
        """
        if sum(at == step for at, _ in self.entries) >= MOST_ROLLBACKS:
            raise MegagptError(
                f"the loss or gradient spikes again after {MOST_ROLLBACKS} rollbacks to step "
                f"{step}; lower schedule.peak_lr (with --allow-changes), or move the newest "
                f"checkpoint and {NAME} away to go further back"
            )
        self.entries.append((step, skipped_samples))

    def write(self, run: Path, **facts: object) -> None:
        """Appends the newest entry to the run's file, flushed to the disk. One rank calls it."""
        step, samples = self.entries[-1]
        line = json.dumps({"step": step, "skipped_samples": samples, **facts}) + "\n"
        path = run / NAME
        whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        with path.open("ab") as file:
            # What a kill has left of a line would spoil this one.
            file.truncate(len(whole[0] + whole[1]))
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def read_journal(run: Path) -> list[Skip]:
    """The entries of the run's file, [] where there is none.

    Raises DamageError for a line that is no entry; only the last may be cut short (by a kill).
    """
    try:
        lines = (run / NAME).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    entries: list[Skip] = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            entries.append((int(entry["step"]), int(entry["skipped_samples"])))
        except (ValueError, KeyError, TypeError):
            raise DamageError(
                f"{run / NAME}, line {number}: not an entry of the journal; it decides which "
                "samples are read, so restore the file from a copy"
            ) from None
    return entries

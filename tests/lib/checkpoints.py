"""What tests of checkpoints do to them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from megagpt.checkpoint import CheckpointRecord, list_checkpoints, record


def fingerprint(run: Path) -> Callable[[int], tuple[str]]:
    found = record.read_record(list_checkpoints(run)[0]).data["fingerprint"]
    return lambda samples: (found,)


def state(step: int, like: CheckpointRecord, milestone: bool = False) -> CheckpointRecord:
    counts = {"step": step, "updates": step, "tokens": step * 512}
    return dataclasses.replace(like, **counts, milestone=milestone, files=())


def flip(path: Path) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)

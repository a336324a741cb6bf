"""What tests of checkpoints do to them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from megagpt.checkpoint import CheckpointRecord, list_checkpoints, record
from megagpt.checkpoint.slice_file import SliceReader


def fingerprint(run: Path) -> Callable[[int], tuple[str]]:
    found = record.read_record(list_checkpoints(run)[0]).data["fingerprint"]
    return lambda samples: (found,)


def state(step: int, like: CheckpointRecord, milestone: bool = False) -> CheckpointRecord:
    counts = {"step": step, "updates": step, "tokens": step * 512}
    return dataclasses.replace(like, **counts, milestone=milestone, files=())


def opened(folder: Path) -> SliceReader:
    """The files of slices in a folder, which get a manifest without an index."""
    names = sorted(path.name for path in folder.glob("rank_*"))
    counts = dict.fromkeys(("step", "tokens", "samples", "seed", "skipped_steps", "updates"), 0)
    tables: dict[str, dict] = {key: {} for key in ("loss_scale", "layout", "data", "versions")}
    files = tuple(record.FileRecord(name, 0, "") for name in names)
    record.write_record(folder, CheckpointRecord(**counts, **tables, milestone=False, files=files))
    return SliceReader(folder)


def flip(path: Path) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)

"""What makes a folder a checkpoint: manifest.json, written last, with every file's checksum (L2).

    RUN/checkpoints/step_00000100/   rank_00000.safetensors ...  config.toml  manifest.json
    RUN/checkpoints/latest           name of the newest one, for people

A checkpoint is written into `step_00000100.tmp` and renamed once everything is on the disk, so a
folder without `.tmp` is whole. What is on the disk may still rot: `verify` reads every byte. The
manifest carries the checksum of its own other lines, so that no byte of it is believed unread.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.checkpoint.slice_file import FileRecord
from megagpt.errors import DamageError, UsageError
from megagpt.files import file_sha256, write_file

FORMAT = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
DAMAGED = ".damaged"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The state of a run that is not in the slices."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens consumed."""
    samples: int
    """Samples consumed, those that a rollback skipped included."""
    seed: int
    skipped_steps: int
    """Steps whose loss or gradient was not finite, so that no update was applied."""
    updates: int
    """Updates applied."""
    loss_scale: dict[str, float]
    layout: dict[str, int]
    data: dict[str, Any]
    """Fingerprint and tokenizer of the training data."""
    versions: dict[str, str]
    milestone: bool
    """Kept for ever, by checkpoint.keep_every_tokens."""
    files: tuple[FileRecord, ...]
    recent: tuple[tuple[float, float], ...] = ()
    """(loss, gradient norm) of the latest steps, by which spikes are told."""
    rollbacks: tuple[tuple[int, int | None], ...] = ()
    """The entries of the run's journal so far: where it went back and what it left out."""
    format: int = FORMAT


def folder_of(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def name_of(step: int) -> str:
    """Name of the checkpoint after `step` steps; names sort as steps do."""
    return f"step_{step:08d}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json, flushed to the disk."""
    write_file(folder / MANIFEST, _text(asdict(manifest)))


def _text(tree: dict[str, Any]) -> str:
    """The one text of a manifest: its facts, then the sha256 of them as JSON."""
    digest = hashlib.sha256(json.dumps(tree, indent=1).encode()).hexdigest()
    return json.dumps(tree | {"sha256": digest}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises DamageError when it is missing or not readable,
    UsageError when another version of megagpt wrote it, which is no damage."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text)
        del tree["sha256"]
        # A damaged byte changes the facts, the checksum or the way they are written.
        if text != _text(tree):
            raise ValueError("its checksum is not that of its content; the file is damaged")
        if tree["format"] != FORMAT:
            raise UsageError(
                f"{path}: format {tree['format']}, but this megagpt reads format {FORMAT}; use "
                "the version that wrote it"
            )
        tree["files"] = tuple(FileRecord(**record) for record in tree["files"])
        return Manifest(**tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DamageError(f"{path}: not a readable manifest ({reason})") from None


def list_checkpoints(run: Path) -> list[Path]:
    """Folders of the run's checkpoints, oldest first; unfinished and damaged ones left out."""
    folders = folder_of(run).glob("step_*")
    return sorted(f for f in folders if f.is_dir() and not f.suffix)


def file_problem(folder: Path, record: FileRecord) -> str | None:
    """What is wrong with one file of a checkpoint, reading all of it; None when it is whole."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path}: {size} bytes, but the manifest says {record.bytes}"
        found = file_sha256(path)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if found != record.sha256:
        return f"{path}: its checksum is not the manifest's; the file is damaged"
    return None


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, reading every byte; empty when it is whole."""
    try:
        manifest = read_manifest(folder)
    except DamageError as error:
        return [str(error)]
    found = (file_problem(folder, record) for record in manifest.files)
    return [problem for problem in found if problem is not None]


def record_of(path: Path) -> FileRecord:
    """The record of a file that is already on the disk."""
    return FileRecord(path.name, path.stat().st_size, file_sha256(path))


def set_aside(folder: Path) -> Path:
    """Gives a damaged checkpoint a name that is never loaded; nothing is deleted."""
    for number in range(1, 1000):
        aside = folder.with_name(f"{folder.name}{DAMAGED}{number}")
        if not aside.exists():
            os.replace(folder, aside)
            return aside
    raise DamageError(f"{folder}: 999 damaged copies are there already; remove them")


def clean(run: Path) -> list[Path]:
    """Removes what a crash left half-written; returns the folders removed. One rank calls this."""
    left = sorted(folder_of(run).glob(f"*{TEMPORARY}"))
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return left


def retire(run: Path, keep_last: int) -> list[Path]:
    """Removes all but the newest `keep_last` and the milestones. One rank calls this.

    A folder whose manifest cannot be read stays: it may be a milestone worth repairing.
    """
    removed = [f for f in list_checkpoints(run)[:-keep_last] if _replaceable(f)]
    for folder in removed:
        # Without its new name a crash in the middle would leave a folder that looks whole.
        doomed = folder.with_name(folder.name + TEMPORARY)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
    return removed


def _replaceable(folder: Path) -> bool:
    try:
        return not read_manifest(folder).milestone
    except (DamageError, UsageError):
        return False

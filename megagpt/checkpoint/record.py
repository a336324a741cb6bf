"""What makes a folder a checkpoint: manifest.json, written last, with every file's checksum (L2).

    RUN/checkpoints/step_00000100/   rank_00000.safetensors ...  config.toml  manifest.json
    RUN/checkpoints/latest           name of the newest one, for people

A checkpoint is written into `step_00000100.tmp` and renamed once everything is on the disk, so a
folder without `.tmp` is whole. What is on the disk may still rot, and the manifest carries the
checksum of its own other lines too, so that no byte of a checkpoint is believed unread.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megagpt.errors import DamageError, UsageError
from megagpt.files import file_sha256, sync_folder, write_file

FORMAT = 1
MANIFEST = "manifest.json"
CONFIG = "config.toml"
TEMPORARY = ".tmp"
DAMAGED = ".damaged"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of one file."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file that is already on the disk."""
        return cls(path.name, path.stat().st_size, file_sha256(path))

    def problem(self, folder: Path) -> str | None:
        """What is wrong with the file in `folder`, reading all of it; None when it is whole."""
        path = folder / self.name
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"{path}: {size} bytes, but the manifest says {self.bytes}"
            if file_sha256(path) != self.sha256:
                return f"{path}: its checksum is not the manifest's; the file is damaged"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
        return None


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """The state of a run that is not in the slices: the keys of manifest.json."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens consumed."""
    samples: int
    """Samples consumed, those that a rollback skipped included."""
    seed: int
    skipped_steps: int
    """Steps without an update: loss or gradient were not finite, or the step spiked."""
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
    """(loss, gradient norm) of the latest steps, by which spikes are detected."""
    rollbacks: tuple[tuple[int, int | None], ...] = ()
    """The entries of the run's journal so far: where it went back and which updates it skipped."""
    format: int = FORMAT


# --- the manifest's text ------------------------------------------------------------------------


def write_record(folder: Path, record: CheckpointRecord) -> None:
    """Writes manifest.json, flushed to the disk."""
    write_file(folder / MANIFEST, _text(asdict(record)))


def _text(tree: dict[str, Any]) -> str:
    """The one text of a manifest: its facts, then the sha256 of them as JSON."""
    digest = hashlib.sha256(json.dumps(tree, indent=1).encode()).hexdigest()
    return json.dumps(tree | {"sha256": digest}, indent=1) + "\n"


def read_record(folder: Path) -> CheckpointRecord:
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
        tree["files"] = tuple(FileRecord(**file) for file in tree["files"])
        return CheckpointRecord(**tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DamageError(f"{path}: not a readable manifest ({reason})") from None


# --- the folders of a run -----------------------------------------------------------------------


def folder_of(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def name_of(step: int) -> str:
    """Name of the checkpoint after `step` steps; names sort as steps do."""
    return f"step_{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Folders of the run's checkpoints, oldest first, without unfinished and damaged ones."""
    folders = folder_of(run).glob("step_*")
    return sorted(f for f in folders if f.is_dir() and not f.suffix)


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, or the one that `folder` is. Raises UsageError for none."""
    folders = [folder] if (folder / MANIFEST).exists() else list_checkpoints(folder)
    if not folders:
        raise UsageError(
            f"{folder}: no checkpoint here; give a run folder (the `output` of a run file) that "
            "was trained and saved"
        )
    return folders


def temporary_of(folder: Path) -> Path:
    """Where a folder is written before it is whole."""
    return folder.with_name(folder.name + TEMPORARY)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes `folder` once all of it is on the disk."""
    temporary = temporary_of(folder)
    # A process that was killed may have left some of it.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    publish(temporary, folder)


def publish(temporary: Path, folder: Path) -> None:
    """Renames a folder that is written; `folder` is absent or empty."""
    sync_folder(temporary)
    os.replace(temporary, folder)
    sync_folder(folder.parent)


def seal(temporary: Path, record: CheckpointRecord, files: Sequence[FileRecord]) -> None:
    """Writes the manifest of a folder that holds `files` and config.toml already."""
    files = (*files, FileRecord.of(temporary / CONFIG))
    write_record(temporary, replace(record, files=files))


def name_latest(folder: Path) -> None:
    """Writes the file that tells people which checkpoint is the newest."""
    write_file(folder.parent / "latest", folder.name + "\n")


def set_aside(folder: Path) -> Path:
    """Gives a damaged checkpoint a name that is never loaded; nothing is deleted."""
    for number in range(1, 1000):
        aside = folder.with_name(f"{folder.name}{DAMAGED}{number}")
        if not aside.exists():
            os.replace(folder, aside)
            return aside
    raise DamageError(f"{folder}: 999 damaged copies are there already; remove them")


def remove_unfinished(run: Path) -> list[Path]:
    """Removes what a crash left half-written; returns the paths removed. One rank calls this."""
    unfinished = sorted(folder_of(run).glob(f"*{TEMPORARY}"))
    for path in unfinished:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return unfinished


def retire(run: Path, keep_last: int) -> list[Path]:
    """Removes all but the newest `keep_last` and the milestones. One rank calls this.

    A folder whose manifest cannot be read stays: it may be a milestone worth repairing.
    """
    removed = [f for f in list_checkpoints(run)[:-keep_last] if _replaceable(f)]
    for folder in removed:
        # Without its new name a crash in the middle would leave a folder that looks whole.
        doomed = temporary_of(folder)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
    return removed


def _replaceable(folder: Path) -> bool:
    try:
        return not read_record(folder).milestone
    except (DamageError, UsageError):
        return False

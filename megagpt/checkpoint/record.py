"""What makes a folder a checkpoint: manifest.json, written last, with every file's checksum (L2).

    RUN/checkpoints/step_00000100/   rank_00000.safetensors ...  slices.json  config.toml
                                     tokenizer.json  manifest.json
    RUN/checkpoints/latest           name of the newest one, for people

A checkpoint is written into `step_00000100.tmp` and renamed once everything is on the disk, so a
folder without `.tmp` is whole. What is on the disk may still rot, and the manifest carries the
checksum of its own other lines too, so that no byte of a checkpoint is believed unread. Only what
the manifest names is read.

In `checkpoints/` the names `step_` and digits, with or without `.tmp` and `.damaged1`, are ours;
everything else is the user's, and neither read nor removed.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megagpt.errors import DamageError, UsageError
from megagpt.files import file_sha256, sealed_json, sync_folder, write_file
from megagpt.tokenizer.portable import FILE

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
CONFIG = "config.toml"
INDEX = "slices.json"
"""Which of the rank_*.safetensors holds what, see slice_index.py; earlier versions wrote none."""
TEMPORARY = ".tmp"
DAMAGED = ".damaged"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of one file."""

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raises ValueError for a name that leads out of the folder."""
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise ValueError(f"{self.name!r} is no name of a file in this folder")

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
    """Of the training data: fingerprint of the order, tokenizer and the fingerprint of its
    vocabulary ("" where it is not known), latest samples and their digest."""
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
    write_file(folder / MANIFEST, sealed_json(asdict(record)))


def read_sealed(content: bytes) -> dict[str, Any]:
    """The object of a text that sealed_json has written. Raises ValueError, KeyError or TypeError
    for another."""
    text = content.decode()
    tree: dict[str, Any] = json.loads(text)
    # A damaged byte changes the facts, the checksum or the way they are written.
    if "sha256" not in tree or text != sealed_json(tree):
        raise ValueError("its checksum is not that of its content; the file is damaged")
    return tree


def read_record(folder: Path) -> CheckpointRecord:
    """The manifest of a checkpoint. Raises DamageError when it is missing or not readable,
    UsageError when another version of megagpt wrote it, which is no damage."""
    path = folder / MANIFEST
    try:
        tree = read_sealed(path.read_bytes())
        if tree["format"] != FORMAT:
            raise UsageError(
                f"{path}: format {tree['format']}, but this megagpt reads format {FORMAT}; use "
                "the version that wrote it"
            )
        del tree["sha256"]
        tree["files"] = tuple(FileRecord(**file) for file in tree["files"])
        return CheckpointRecord(**tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DamageError(f"{path}: not a readable manifest ({reason})") from None


def named_record(folder: Path) -> CheckpointRecord:
    """The manifest of a checkpoint whose folder has the right name. Raises what read_record raises,
    and DamageError for the name of another step."""
    saved = read_record(folder)
    if step_of(folder) not in (None, saved.step):
        raise DamageError(
            f"{folder}: is of step {saved.step} by its manifest; give it its name again"
        )
    return saved


def strangers(folder: Path, files: Iterable[FileRecord], manifest: str = MANIFEST) -> list[str]:
    """Names that lie in the folder and not in its manifest, sorted; nothing reads them."""
    known = {file.name for file in files} | {manifest}
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


# --- the folders of a run -----------------------------------------------------------------------


def folder_of(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def name_of(step: int) -> str:
    """Name of the checkpoint after `step` steps, with eight digits or more."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's name tells; None for another name."""
    found = re.fullmatch("step_([0-9]+)", folder.name)
    return int(found[1]) if found else None


def list_checkpoints(run: Path) -> list[Path]:
    """Folders of the run's checkpoints, oldest first, without unfinished and damaged ones.

    Raises OSError for a folder that is there and cannot be read: a run must not begin anew for it.
    """
    try:
        entries = list(folder_of(run).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = [(step_of(f), f) for f in entries if f.name.startswith("step_") and f.is_dir()]
    return [folder for _, folder in sorted((s, f) for s, f in steps if s is not None)]


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, or the one that `folder` is. Raises UsageError for none."""
    folders = [folder] if (folder / MANIFEST).exists() else list_checkpoints(folder)
    if not folders:
        raise UsageError(
            f"{folder}: no checkpoint here; give a run folder (the `output` of a run file) that "
            "was trained and saved"
        )
    return folders


def unfinished_of(folder: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return folder.with_name(folder.name + TEMPORARY)


@contextmanager
def written_whole(folder: Path, temporary: Path) -> Iterator[Path]:
    """`temporary`, empty, to write into; it becomes `folder` once all of it is on the disk, and
    goes when that fails."""
    # A process that was killed may have left some of it.
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    for path in temporary.iterdir():
        sync_folder(path)  # what other libraries have written into it
    publish(temporary, folder)


def publish(temporary: Path, folder: Path) -> None:
    """Renames a folder that is written; `folder` is absent or empty."""
    sync_folder(temporary)
    os.replace(temporary, folder)
    sync_folder(folder.parent)


def seal(temporary: Path, record: CheckpointRecord, files: Sequence[FileRecord]) -> None:
    """Writes the manifest of a folder that holds `files`, config.toml and, where there are such,
    slices.json and tokenizer.json already."""
    more = [path for name in (INDEX, CONFIG, FILE) if (path := temporary / name).exists()]
    write_record(temporary, replace(record, files=(*files, *map(FileRecord.of, more))))


def name_latest(folder: Path) -> None:
    """Writes the file that tells people which checkpoint is the newest."""
    write_file(folder.parent / "latest", folder.name + "\n")


def set_aside(folder: Path) -> Path:
    """Gives a damaged checkpoint a name that is never loaded; nothing is deleted."""
    for number in range(1, 1000):
        aside = folder.with_name(f"{folder.name}{DAMAGED}{number}")
        if not os.path.lexists(aside):
            os.replace(folder, aside)
            return aside
    raise DamageError(f"{folder}: 999 damaged copies are there already; remove them")


def remove_unfinished(run: Path) -> list[Path]:
    """Removes what a crash left half-written; returns the paths removed. One rank calls this.

    What cannot be removed (on NFS a folder in which another process has a file open) stays, and is
    told: it is no checkpoint, and no reason for a run to end.
    """
    names = sorted(folder_of(run).glob(f"step_*{TEMPORARY}"))
    unfinished = [path for path in names if step_of(path.with_suffix("")) is not None]
    removed = []
    for path in unfinished:
        try:
            remove(path)
            removed.append(path)
        except OSError as error:
            log.warning("%s is no checkpoint, but stays: %s", path, error.strerror)
    return removed


def remove(path: Path) -> None:
    """Removes a file or a folder, and of a link the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def saved_here(run: Path) -> list[tuple[Path, CheckpointRecord]]:
    """The checkpoints that a run has saved in its folder, oldest first, with their manifests.

    Without those whose manifest cannot be read (they may be worth repairing), and without what a
    user has put there: a link, and a name that a run would not give.
    """
    found = []
    for folder in list_checkpoints(run):
        with suppress(DamageError, UsageError):
            saved = read_record(folder)
            if folder.name == name_of(saved.step) and not folder.is_symlink():
                found.append((folder, saved))
    return found


def retire(run: Path, keep_last: int) -> list[Path]:
    """Removes all that the run saved here but the newest `keep_last` and the milestones. One rank
    calls this."""
    ours = saved_here(run)
    removed = [folder for folder, saved in ours[:-keep_last] if not saved.milestone]
    for folder in removed:
        # Without its new name a crash in the middle would leave a folder that looks whole.
        doomed = unfinished_of(folder)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
    return removed

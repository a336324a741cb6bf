"""A corpus on a host's own disk: copied once by one process of the host, each file against its
checksum (L1).

    srun --ntasks-per-node=1 megagpt data stage data/web /local/scratch
"""

import fcntl
import json
import shutil
from pathlib import Path
from typing import NoReturn

from megagpt.corpus.manifest import MANIFEST, read_manifest
from megagpt.corpus.progress import Progress
from megagpt.errors import FULL, DamageError, UsageError
from megagpt.files import file_sha256, temporary_of, whole_file, write_file

STATE = ".staged.json"
"""In the copy: what its files were when they were found whole."""


def stage(folder: Path, scratch: Path) -> tuple[Path, int]:
    """(the copy of a corpus below `scratch`, bytes that were copied); all processes of a host may
    call it, and one of them copies.

    Files that are there already and whole are kept, whoever copied them. Raises UsageError where
    the disk has no room, DamageError for a file that is missing or not what the manifest says;
    neither leaves such a file behind.
    """
    manifest, target = read_manifest(folder), scratch / folder.resolve().name
    if target.resolve() == folder.resolve():
        raise UsageError(f"{scratch}: {folder} lies there already; give another folder")
    digests: dict[str, str] = {}
    for shard in manifest.shards:
        digests |= {path.name: digest for path, _, digest in manifest.files(shard)}
    if manifest.tokenizer_name.endswith(".json"):
        digests[manifest.tokenizer_name] = manifest.tokenizer_sha256
    # Of a corpus that has grown since, the copy would keep the old one. It is copied last.
    digests[MANIFEST] = file_sha256(folder / MANIFEST)
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".staging").open("w") as lock:
        # The processes that wait find the copy made.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return target, _fill(folder, target, digests)
        except OSError as error:
            if error.errno not in FULL:
                raise
            left = sum(_size(folder / name) for name in digests if not (target / name).exists())
            _no_room(target, left)


def _fill(folder: Path, target: Path, digests: dict[str, str]) -> int:
    """Copies what of these files is not there; the bytes of it. digests: sha256 by name, "" for
    any."""
    known = _recall(target / STATE)
    sizes = {name: _size(folder / name) for name in digests}
    with Progress(f"staging {folder}", sum(sizes.values())) as progress:
        wanted = []
        for name, digest in digests.items():
            if known.get(name) == _state(target / name, digest):
                progress.skip(sizes[name])
            elif not _is_whole(target / name, sizes[name], digest, progress):
                wanted.append(name)
        if wanted and MANIFEST not in wanted:
            wanted.append(MANIFEST)
        # What the corpus had that was more, and what was not finished.
        old = [target / Path(name).name for name in known.keys() - digests.keys()]
        old += [temporary_of(target / name) for name in digests] + [target / n for n in wanted]
        # A folder with a manifest is whole.
        there = [path for path in reversed(old) if path.is_file()]
        needed = sum(sizes[name] for name in wanted)
        if needed > shutil.disk_usage(target).free + sum(path.stat().st_size for path in there):
            _no_room(target, needed)
        for path in there:
            path.unlink()
        for name in wanted:
            _copy(folder / name, target / name, digests[name], progress)
    states = {name: _state(target / name, digest) for name, digest in digests.items()}
    if states != known:
        write_file(target / STATE, json.dumps(states, indent=1) + "\n")
    return needed


def _is_whole(copy: Path, size: int, digest: str, progress: Progress) -> bool:
    if not digest or not copy.is_file() or copy.stat().st_size != size:
        return False
    return file_sha256(copy, progress.add) == digest


def _no_room(target: Path, needed: int) -> NoReturn:
    free = shutil.disk_usage(target).free
    raise UsageError(
        f"{target}: {needed:,} bytes are needed and {free:,} are free; give another place"
    ) from None


def _size(source: Path) -> int:
    try:
        return source.stat().st_size
    except FileNotFoundError:
        raise DamageError(f"{source}: missing; restore it, or prepare the corpus again") from None


def _copy(source: Path, target: Path, digest: str, progress: Progress) -> None:
    """Copies a file so that it is whole or not there. digest: its sha256, "" for any."""
    with whole_file(target) as copy:
        found = file_sha256(source, progress.add, copy)
        if digest and found != digest:
            raise DamageError(
                f"{source}: sha256 {found[:12]}..., the manifest says {digest[:12]}...; restore "
                "the file from a copy, or prepare the corpus again"
            )


def _recall(path: Path) -> dict[str, str]:
    """What was found whole; a state that cannot be read only costs time."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(path: Path, digest: str) -> str:
    """Changes whenever the file or what is expected of it changes."""
    try:
        found = path.stat()
    except OSError:
        return "missing"
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino} {digest}"

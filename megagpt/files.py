"""Files that are whole or absent, digests, and one lock (L0, stdlib only)."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megagpt.errors import UsageError

log = logging.getLogger(__name__)

BLOCK = 1 << 20
"""Bytes that are read at a time."""
NAME = ".lock"
_BUSY = (BlockingIOError, PermissionError)
"""What POSIX raises for a lock that another process holds."""


def shipped(name: str) -> Path:
    """The folder `ds_configs` or `launch`: beside the package in a checkout, inside it once
    installed."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file in hex; `progress` is told the bytes of every block."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def temporary_of(path: Path) -> Path:
    """Where a file or folder is written before it is whole: a name that no user gives."""
    return path.with_name(f".{path.name}.megagpt.tmp")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path`, flushed to the disk, once the block is done.

    After an error in the block `path` is what it was.
    """
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def write_durably(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to the disk, rename: the file is whole or absent."""
    with whole_file(path) as file:
        file.write(content)


def write_file(path: Path, text: str) -> None:
    """Writes a small text file so that it is whole or not there."""
    write_durably(path, text.encode())


def sealed_json(tree: dict[str, Any]) -> str:
    """The one text of a JSON object that carries the sha256 of its other lines as a last key.

    A damaged byte changes the values, the checksum or the way they are written, so that comparing
    a text with the one of what it holds finds any.
    """
    facts = {key: value for key, value in tree.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(facts, indent=1).encode()).hexdigest()
    return json.dumps(facts | {"sha256": digest}, indent=1) + "\n"


def copy_aside(path: Path, name: str = "") -> Path:
    """Copies a damaged file beside itself, as `name`.broken-1 or the next number that is free.

    `name`: the file's own unless another is given.
    """
    number = 1
    while (aside := path.with_name(f"{name or path.name}.broken-{number}")).exists():
        number += 1
    shutil.copyfile(path, aside)
    return aside


def displaced(path: Path, descriptor: int) -> bool:
    """Whether another file than the open one, or none, has the name: what is written is lost."""
    try:
        return not os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return True


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path, wait_s: float = 60.0) -> None:
    """Keeps `folder` for this process until it ends, whatever ends it. One rank calls this.

    Waits up to `wait_s` seconds: a run that was asked to stop may still be saving. Raises
    UsageError that names the process which trains there. A file system without locks has none.
    """
    # Never closed: the system gives the lock back with the process, after kill -9 too.
    file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    until, told = time.monotonic() + wait_s, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except _BUSY:
            owner = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            if time.monotonic() > until:
                raise UsageError(
                    f"{folder} is being trained by {owner}; stop it first, or choose another output"
                ) from None
            if not told:
                log.warning("%s: waiting for %s, which still trains there", folder, owner)
                told = True
            time.sleep(0.2)
        except OSError:
            return
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

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

from megagpt.errors import MegagptError, UsageError

log = logging.getLogger(__name__)

BLOCK = 1 << 20
"""Bytes that are read at a time."""
NAME = ".lock"
ENDS = ", ends by itself by "
"""Before the time, in seconds since 1970, that a lock tells."""
_BUSY = (BlockingIOError, PermissionError)
"""What POSIX raises for a lock that another process holds."""


def shipped(name: str) -> Path:
    """The folder `ds_configs` or `launch`: beside the package in a checkout, inside it once
    installed."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def file_sha256(
    path: Path, progress: Callable[[int], None] | None = None, copy: BinaryIO | None = None
) -> str:
    """sha256 of a file in hex; `progress` is told the bytes of every block, which is written to
    `copy`, too."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if copy:
                copy.write(block)
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


class Lock:
    """Keeps a folder for this process until it ends, whatever ends it. One rank makes one.

    What the lock says: who holds it, and when at the latest that process ends by itself should it
    not get on. A file system without locks has none.
    """

    def __init__(
        self, folder: Path, wait_s: float = 60.0, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Waits for a run that was asked to stop and may still be saving, or that is cut off from
        its other hosts and will end; `alive` is called meanwhile.

        Raises UsageError that names a process which trains there and gets on, or says nothing of
        its end for `wait_s` seconds; MegagptError for one that has not ended when it should have.
        """
        self._told = float("-inf")
        # Never closed: the system gives the lock back with the process, after kill -9 too.
        self._file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        began, first = time.monotonic(), ""
        while not self._taken():
            said = os.pread(self._file, 200, 0).decode(errors="replace") or "another process"
            owner, _, until = said.partition(ENDS)
            left_s = float(until) - time.time() if until.strip().isdigit() else 0.0
            waited_s = time.monotonic() - began
            if not first:
                first, most_s = said, max(wait_s, left_s + wait_s)
                minutes = f", {most_s / 60:.0f} minutes at most" if left_s > wait_s else ""
                log.warning(
                    "%s: waiting for %s, which still trains there%s", folder, owner, minutes
                )
            if waited_s > wait_s and (not left_s or said != first):
                raise UsageError(
                    f"{folder} is being trained by {owner}; stop it first, or choose another output"
                )
            if waited_s > most_s:
                raise MegagptError(
                    f"{folder} is still kept by {owner}, which should have ended by itself; end it "
                    "on its host"
                )
            alive()
            time.sleep(0.2)
        self.ends_within(0)

    def _taken(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except _BUSY:
            return False
        except OSError:
            pass
        return True

    def ends_within(self, seconds: float) -> None:
        """Tells others that this process gets on, or ends within so many seconds; 0: not known.

        Written every few seconds at most.
        """
        if seconds:
            if time.monotonic() - self._told < 5:
                return
            self._told = time.monotonic()
        end = f"{ENDS}{time.time() + seconds:.0f}" if seconds else ""
        text = f"process {os.getpid()} on {socket.gethostname()}{end}"
        with contextlib.suppress(OSError):
            os.pwrite(self._file, text.encode(), 0)
            os.ftruncate(self._file, len(text.encode()))

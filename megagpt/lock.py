"""One training a run folder: two would write over each other's checkpoints (L3, stdlib only)."""

import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from megagpt.errors import UsageError

log = logging.getLogger(__name__)

NAME = ".lock"
_BUSY = (BlockingIOError, PermissionError)
"""What POSIX raises for a lock that another process holds."""


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

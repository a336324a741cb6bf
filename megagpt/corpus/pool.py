"""Worker processes that take units; a dead one is noticed, none outlives its parent."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from megagpt.corpus.source import Unit
from megagpt.errors import DamageError, MegagptError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT)
STOPS = {signal.SIGINT, signal.SIGTERM}
PR_SET_PDEATHSIG = 1


class Job(Protocol):
    """What the workers do; each has its own copy."""

    @property
    def folder(self) -> Path:
        """Where they write."""

    @property
    def note(self) -> str:
        """What is to be told of the work, if anything."""

    def start(self) -> None:
        """Called once in each worker."""

    def run(self, unit: Unit) -> None:
        """Called for each unit."""


class Pool:
    """`workers` processes; `send` gives a unit to an idle one, `receive` waits for finished ones.

    Started by fork on Linux, so that the parent's vocabulary is shared; the parent must not have
    started threads before.
    """

    def __init__(self, workers: int, job: Job) -> None:
        # Elsewhere fork is unsafe or missing, and the job is pickled.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._processes: list[Any] = []
        self._ends: list[Connection] = []
        self._busy: dict[Connection, Unit] = {}
        self.notes: set[str] = set()
        # A signal in the middle of a fork would be raised where Python drops exceptions.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                inherited = [*self._ends, ours] if sys.platform == "linux" else []
                process = context.Process(target=_work, args=(theirs, inherited, job), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._ends.append(ours)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def idle(self) -> int:
        """Workers without a unit."""
        return len(self._ends) - len(self._busy)

    @property
    def busy(self) -> int:
        """Workers with a unit."""
        return len(self._busy)

    def send(self, unit: Unit) -> None:
        """Give a unit to an idle worker."""
        end = next(end for end in self._ends if end not in self._busy)
        self._busy[end] = unit
        try:
            end.send(unit)
        except (BrokenPipeError, ConnectionResetError):
            self._died(end)

    def receive(self, timeout_s: float | None = None) -> list[int]:
        """Numbers of units that were finished. Raises what a worker raised."""
        done = []
        for end in wait(list(self._busy), timeout_s):
            assert isinstance(end, Connection)
            try:
                kind, message = end.recv()
            except (EOFError, ConnectionResetError):
                self._died(end)
            unit = self._busy.pop(end)
            if kind == "done":
                done.append(unit.number)
                if message:
                    self.notes.add(message)
            else:
                raise _error(kind, message)
        return done

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            if self._busy:
                process.terminate()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def _died(self, end: Connection) -> None:
        unit = self._busy[end]
        process = self._processes[self._ends.index(end)]
        process.join(5)
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        where = ", ".join(unit.paths[:3]) or f"unit {unit.number}"
        raise MegagptError(
            f"a worker {how} at {where}. SIGKILL often means that memory ran out: run the same "
            "command again with fewer --workers; it continues where it stopped"
        )


def _error(kind: str, message: str) -> Exception:
    kinds = {"usage": UsageError, "damage": DamageError, "failure": MegagptError}
    return kinds[kind](message) if kind in kinds else RuntimeError(message)


def full_disk(error: OSError, folder: os.PathLike[str] | str) -> MegagptError:
    """The message for a disk without space."""
    return MegagptError(
        f"{folder}: {error.strerror}; make space and run the same command again, it continues "
        "where it stopped"
    )


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that no orphan writes parts."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _work(end: Connection, inherited: list[Connection], job: Job) -> None:
    """The life of a worker: units in, files on the disk, numbers out."""
    # Copies of the parent's ends would keep pipes open after the parent's death.
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    _die_with_parent()
    try:
        job.start()
        while True:
            job.run(end.recv())
            end.send(("done", job.note))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except MegagptError as error:
        kind = {2: "usage", 3: "damage"}.get(error.exit_code, "failure")
        end.send((kind, str(error)))
    except OSError as error:
        if error.errno in FULL:
            end.send(("failure", str(full_disk(error, job.folder))))
        else:
            end.send(("crash", traceback.format_exc()))
    except BaseException:  # pyo3's panics are no Exceptions
        end.send(("crash", traceback.format_exc()))
    finally:
        # The parent's exit handlers are not ours.
        sys.stderr.flush()
        os._exit(0)

"""Units through worker processes and out again in their order; no worker outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

from megagpt.corpus.unit import Unit
from megagpt.errors import MegagptError

AHEAD = 256
"""Units between the first that has not come out and the last that a worker may have."""
STOPS = {signal.SIGINT, signal.SIGTERM}

Work = Callable[[Unit], str]
"""What a worker does with a unit; returns a note for the summary, mostly an empty one."""
Waiting = deque[tuple[Unit, Future[str] | None]]
"""Units that have not come out, in order; no future for those that were done before."""


class Workers:
    """`count` processes that do the same work; use as a context manager.

    They are started by fork on Linux, so that the parent's vocabulary is shared; the parent must
    not have started threads before.
    """

    def __init__(self, count: int, work: Work) -> None:
        # Elsewhere fork is unsafe or missing, and the work is pickled.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        others = set(multiprocessing.active_children())
        self._count = count
        self._executor = ProcessPoolExecutor(count, context, _start, (work,))
        # The main thread waits on this queue alone: a signal leaves it as it is, where futures
        # and their conditions could be left locked.
        self._finished: SimpleQueue[Future[str]] = SimpleQueue()
        with signals_held():
            for _ in range(count):
                self._executor.submit(os.getpid)  # anything: a task starts a process
        self._processes = set(multiprocessing.active_children()) - others
        self.notes: set[str] = set()

    def in_order(self, units: Iterator[Unit], is_done: Callable[[Unit], bool]) -> Iterator[Unit]:
        """The units, without their payload, each when it has been worked on; workers are kept
        busy meanwhile. `is_done` is asked once for each unit in order: what an earlier run did is
        left alone. Raises what a worker raised, and MegagptError when one died."""
        waiting: Waiting = deque()
        try:
            yield from self._in_order(units, is_done, waiting)
        except BrokenProcessPool:
            raise self._died(waiting) from None

    def _in_order(
        self, units: Iterator[Unit], is_done: Callable[[Unit], bool], waiting: Waiting
    ) -> Iterator[Unit]:
        running, more = 0, True
        while more or waiting:
            while waiting and (waiting[0][1] is None or waiting[0][1].done()):
                unit, future = waiting[0]
                if future is not None:
                    self.notes.add(future.result())
                waiting.popleft()
                yield unit
            # One more than there are workers, so that none waits for this process.
            if more and running <= self._count and len(waiting) < AHEAD:
                following = next(units, None)
                if following is None:
                    more = False
                    continue
                future = None
                if not is_done(following):
                    with signals_held():
                        future = self._executor.submit(_run, following)
                        future.add_done_callback(self._finished.put)
                    running += 1
                waiting.append((replace(following, payload=None), future))
            elif running:
                self._finished.get()
                running -= 1

    def _died(self, waiting: Waiting) -> MegagptError:
        """The error of a dead worker, which had one of the first units that are not done."""
        self._executor.shutdown(wait=True)
        codes = [process.exitcode or 0 for process in self._processes]
        # The executor ends the others with SIGTERM.
        code = min((c for c in codes if c not in (0, -signal.SIGTERM)), default=-signal.SIGTERM)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        units = [unit for unit, future in waiting if future and future.exception()][: self._count]
        names = [name for unit in units for name, _ in unit.files[:3]]
        names = list(dict.fromkeys(names)) or [f"unit {unit.number}" for unit in units]
        return MegagptError(
            f"a worker {how} at {' or '.join(names[:3])}. SIGKILL often means that memory ran out: "
            "run the same command again with fewer --workers; it continues where it stopped"
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End all workers; after an error or a signal, whatever they are doing."""
        with signals_held():
            if kind is not None:
                for process in self._processes:
                    process.terminate()
            self._executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM wait. Raised in the middle of a fork, Python would drop the exception;
    raised inside the executor, it could leave a lock behind. Threads that are started here never
    take them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in a worker --------------------------------------------------------------------------------

_WORK: list[Work] = []
"""The one work of this process: the executor hands units over, and nothing else."""


def _start(work: Work) -> None:
    _WORK.append(work)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for units for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(unit: Unit) -> str:
    return _WORK[0](unit)

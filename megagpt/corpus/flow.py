"""Units through worker processes and out again in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from megagpt.corpus.pool import Pool
from megagpt.corpus.source import Unit

AHEAD = 256
"""Units between the first that has not come out and the last that a worker may have."""


def flow(units: Iterator[Unit], pool: Pool, done: Callable[[Unit], bool]) -> Iterator[Unit]:
    """The units, without their payload, each when the pool has worked on it; workers are kept
    busy meanwhile. `done` is asked once for each unit in order: what an earlier run did is left
    alone."""
    waiting: deque[Unit] = deque()
    todo: deque[Unit] = deque()
    finished: set[int] = set()
    more = True
    while more or waiting:
        while todo and pool.idle:
            pool.send(todo.popleft())
        while waiting and waiting[0].number in finished:
            finished.remove(waiting[0].number)
            yield waiting.popleft()
        if more and not todo and len(waiting) < AHEAD:
            unit = next(units, None)
            if unit is None:
                more = False
                continue
            if done(unit):
                finished.add(unit.number)
            else:
                todo.append(unit)
            waiting.append(replace(unit, payload=None))
        elif pool.busy:
            finished.update(pool.receive())

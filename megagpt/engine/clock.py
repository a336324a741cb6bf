"""What a step spends its time on: each moment belongs to one part, the innermost (L2).

    clock.begin()
    with clock.part("backward"):
        ...                              # a collective in here is timed as "communication"
    clock.seconds()                      # {"backward": 0.3, "communication": 0.05, "other": 0.01}

On a GPU the parts are stretches of the stream that computes, marked by events, which wait for
nothing; what DeepSpeed hides behind the computation on another stream costs no time and counts as
none. Elsewhere they are wall time.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

COMMUNICATION = "communication"
REST = "other"


class Clock:
    """Times one rank's step; the parts of a step never overlap and add up to all of it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.begin()

    def begin(self) -> None:
        """Starts anew."""
        self._part = REST
        self._marks: list[tuple[str, Any]] = []
        self._mark(REST)

    def _mark(self, part: str) -> None:
        """From now on, time belongs to `part`."""
        self._part = part
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time inside belongs to `name`, except what an inner part takes."""
        if self._cuda and torch.cuda.current_stream() != torch.cuda.default_stream():
            # Beside the computation, not in its way.
            yield
            return
        outer = self._part
        self._mark(name)
        try:
            yield
        finally:
            self._mark(outer)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls timed as `name`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since `begin`; on a GPU it waits for the work handed in so far."""
        self._mark(REST)
        if self._cuda:
            self._marks[-1][1].synchronize()
        found = {REST: 0.0}
        for (part, since), (_, until) in zip(self._marks, self._marks[1:], strict=False):
            spent = since.elapsed_time(until) / 1e3 if self._cuda else until - since
            found[part] = found.get(part, 0.0) + spent
        del self._marks[:-1]
        return found


COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "barrier"),
    *("all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "all_to_all"),
    *("gather", "scatter", "send", "recv", "isend", "irecv"),
)
"""Methods of DeepSpeed's communication backend that move tensors between ranks."""


def time_collectives(clock: Clock) -> None:
    """Has this clock time DeepSpeed's collectives, and the waits for those that it started ahead.

    DeepSpeed's own timer would wait for the GPU around each. One backend serves a process, so an
    engine that is built later takes it over.
    """
    backend = sys.modules["deepspeed.comm.comm"].cdb
    if not hasattr(backend, "megagpt_clock"):
        for name in COLLECTIVES:
            setattr(backend, name, _timed(backend, getattr(backend, name)))
    backend.megagpt_clock = clock


def _timed(backend: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with backend.megagpt_clock.part(COMMUNICATION):
            found = method(*args, **kwargs)
        return _Waited(backend, found) if hasattr(found, "wait") else found

    return call


class _Waited:
    """A collective under way, the wait for it timed."""

    def __init__(self, backend: Any, work: Any) -> None:
        self._backend, self._work = backend, work

    def wait(self, *args: Any) -> Any:
        with self._backend.megagpt_clock.part(COMMUNICATION):
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

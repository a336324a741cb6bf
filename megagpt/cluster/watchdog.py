"""A hung step, and ranks whose launcher has died, end the job instead of burning its hours (L2).

A thread on every rank watches for two things. When the present phase lasts beyond its limit, it
writes the Python stacks of all threads to RUN/stacks/rank_00000.txt, the latest collectives beside
it, and ends the process: a collective that hangs cannot be unwound. When the launcher is gone, it
asks for a joint save as a signal would, and ends the process where none is done in time. A launcher
that sees one rank end stops the others.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from megagpt.cluster.ranks import Ranks
from megagpt.errors import EXIT_FAILURE
from megagpt.files import Lock

FACTORS = {"start": 4.0, "first step": 4.0, "step": 1.0, "evaluation": 4.0, "saving": 4.0}
"""Phase -> its limit as a multiple of log.watchdog_minutes. The start reads checksums and a
checkpoint, the first step compiles."""
GRACE_S = 5.0
"""Seconds between the stacks and the end, so that the other ranks can write theirs."""
ORPHAN_S = 20.0
"""Seconds that a rank without its launcher has for a step; hung beside dead ranks it has no end."""
LONG_S = 600.0
"""Seconds that it has for any other phase, such as the evaluation that it is in, and for a save."""
LOOK_S = 0.5
"""Seconds between two looks."""
FOLDER = "stacks"
"""In the run folder."""
COLLECTIVES = "collectives_"
"""Before the rank, in the names of files beside the stacks."""
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh")


class Watchdog:
    """Watches one rank, as a context; does nothing before it is entered."""

    def __init__(self, run: Path, ranks: Ranks, minutes: float, meeting_minutes: float = 0) -> None:
        """minutes: limit of a step, 0 for none; the launcher is watched in any case.
        meeting_minutes: what the ranks wait for each other, which has a limit of its own."""
        self.path = run / FOLDER / f"rank_{ranks.rank:05d}.txt"
        self.rank = ranks.rank
        self.limit_s = 60 * minutes
        self.launchers = launchers(ranks.launcher)
        # For rank 0 to come, for it to wait itself, and for its word.
        self._meeting_s = 3 * 60 * meeting_minutes
        self.keeps: Lock | None = None
        """What keeps the run folder for this process, where it does."""
        self._stepped = False
        self._step_s = 0.0
        """The longest step so far."""
        self._phase: tuple[str, float, float] = ("start", time.monotonic(), 0.0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="megagpt-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.begin("start")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def begin(self, phase: str) -> None:
        """A phase of FACTORS begins, and with it its time; beginning it again is a sign of life."""
        before, since, _ = self._phase
        if before == "step":
            self._step_s = max(self._step_s, time.monotonic() - since)
        if phase == "step" and not self._stepped:
            self._stepped, phase = True, "first step"
        limit_s = FACTORS[phase] * self.limit_s
        if limit_s and phase == "start" and not self._thread.is_alive():
            limit_s += self._meeting_s  # the watch begins before the ranks have met
        # One assignment, so that the thread never sees half of it.
        self._phase = (phase, time.monotonic(), limit_s)
        if limit_s > 0:
            # Should the thread not run because something holds Python's lock, this still does.
            faulthandler.dump_traceback_later(limit_s + 3 * GRACE_S, exit=True)
            if self.keeps is not None:
                self.keeps.ends_within(limit_s + 4 * GRACE_S)

    def alive(self) -> None:
        """A sign of life within a phase, as often as one likes."""
        if time.monotonic() - self._phase[1] > 1:
            self.begin(self._phase[0])

    def _watch(self) -> None:
        gone = float("inf")
        while not self._over.wait(LOOK_S):
            phase, since, limit_s = self._phase
            if 0 < limit_s < time.monotonic() - since:
                self._tell(phase, limit_s)
                time.sleep(GRACE_S)
                os._exit(EXIT_FAILURE)
            patience_s = max(ORPHAN_S, 2 * self._step_s) if phase == "step" else LONG_S
            if time.monotonic() - max(gone, since) > patience_s:
                _say(f"rank {self.rank}: no end of this {phase} in {patience_s:.1f} s; not saved")
                os._exit(EXIT_FAILURE)
            if gone == float("inf") and orphaned(self.launchers):
                gone = time.monotonic()
                _say(f"rank {self.rank}: the launcher is gone; saving and ending")
                os.kill(os.getpid(), signal.SIGTERM)

    def _tell(self, phase: str, limit_s: float) -> None:
        """Writes the stacks, and to stderr where they are."""
        head = f"rank {self.rank}: no end of this {phase} within {limit_s / 60:g} minutes"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {head}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = str(self.path)
        except OSError as error:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            where = f"above ({self.path}: {error.strerror})"
        _say(f"{head} (log.watchdog_minutes); its stacks: {where}; ending without saving")
        record_collectives(self.path.with_name(f"{COLLECTIVES}{self.rank}"))


def record_collectives(path: Path) -> None:
    """Writes which collectives this rank has begun and ended, pickled; those of NCCL torchfrtrace
    reads from all ranks, to tell which was behind. Nothing where no group is joined, or where the
    disk refuses."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return
    library = torch._C._distributed_c10d
    nccl = torch.distributed.get_backend() == "nccl"
    dump = library._dump_nccl_trace if nccl else library._dump_fr_trace
    with contextlib.suppress(OSError, RuntimeError):
        path.write_bytes(dump())


def _say(text: str) -> None:
    # The connection to the launcher's terminal may be gone with the launcher.
    with contextlib.suppress(OSError):
        # Not through logging or print, whose locks the hung thread may hold.
        os.write(2, f"megagpt: {text}\n".encode())


def launchers(launcher: str) -> dict[int, int]:
    """The chain of processes that must live: process id -> its parent's id, this one first.

    Empty for plain python, which may outlive the shell that started it. The chain goes on above
    the launcher where that is known to last as long as the run: to the `deepspeed` command, which
    leaves launcher and ranks behind when it is killed, and on the other hosts to the connection
    over which pdsh started the launcher; to SLURM's own process of the step.
    """
    if launcher == "python":
        return {}
    parent = os.getppid()
    chain, above_launcher = {os.getpid(): parent}, {}
    by_deepspeed = "deepspeed.launcher.launch" in _command(parent)[1]
    process = parent
    while (above := parent_of(process)) is not None:
        above_launcher[process] = above
        name, words = _command(above)
        runs_deepspeed = any(os.path.basename(word) in ("deepspeed", "ds") for word in words[:3])
        starts_launchers = runs_deepspeed or name.startswith("sshd")
        if name == "slurmstepd" or by_deepspeed and starts_launchers:
            return chain | above_launcher
        if name not in SHELLS:
            break
        process = above
    return chain


def orphaned(chain: dict[int, int]) -> bool:
    """Whether a process of the chain has another parent than it had."""
    return any(parent_of(process) != parent for process, parent in chain.items())


def parent_of(process: int) -> int | None:
    """The parent's id, None where it is not known: the process is gone or hidden."""
    try:
        return psutil.Process(process).ppid()
    except psutil.Error:
        return None


def _command(process: int) -> tuple[str, list[str]]:
    """Name of a program and the words of its command line, empty where they are not known."""
    try:
        found = psutil.Process(process)
        return found.name(), found.cmdline()
    except psutil.Error:
        return "", []

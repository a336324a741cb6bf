"""What megagpt sets for the whole process, and how a rank joins and leaves the others (L2).

| what is set | when | why |
|---|---|---|
| RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT | prepare_environment | one form for all |
| OMP_WAIT_POLICY OMP_NUM_THREADS | prepare_environment | ranks share the cores of a host |
| LOCAL_RANK or DS_ACCELERATOR by the GPUs that are visible | join | DeepSpeed binds to it |
| mallopt of glibc, on CPUs | join | the memory of a step is kept for the next one |
| DeepSpeed's logger, inference extension; a filter of warnings | join | noise, a compiler |
| the GPU of this rank, the process group | join | |
| TORCH_FR_BUFFER_SIZE | prepare_environment | the latest collectives, told when a run hangs |
| the meeting with the other ranks | meet | one rank reports what ends all |
| GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME | meet | each rank of several hosts by its way to rank 0 |
| exit without Python's teardown | end | threads of groups that DeepSpeed keeps would abort it |

What the user exported stays, but for the five of the first row and for LOCAL_RANK.
"""

import atexit
import contextlib
import ctypes
import logging
import os
import platform
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import psutil

from megagpt.cluster.agreement import facts_of_run
from megagpt.cluster.interface import choose_interface
from megagpt.cluster.meeting import LongWork, Meeting
from megagpt.cluster.mpi import mpi_address
from megagpt.cluster.ranks import MASTER, Ranks, cores, slurm_address, told_rank
from megagpt.cluster.watchdog import parent_of
from megagpt.config import RunConfig
from megagpt.errors import MegagptError

MEETING_MINUTES = 10.0
"""How long ranks wait for each other, unless log.meeting_minutes says; less where
log.watchdog_minutes is less."""
GROUP_MINUTES = 30.0
"""Longest collective of the group; a hung step is the watchdog's."""
FLIGHT_RECORDER_SIZE = 2000
"""Collectives that torch remembers: some steps of a large model."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""
REAPERS = ("init", "systemd", "tini", "dumb-init", "docker-init", "containerd-shim-runc-v2")
"""Programs that Linux hands orphans to."""
_meetings: list[Meeting] = []
"""The meetings of this process; the last one counts."""


# --- before torch is imported -------------------------------------------------------------------


def prepare_environment(ranks: Ranks, environ: MutableMapping[str, str]) -> None:
    """Sets what torch and DeepSpeed read from the environment; call before importing either."""
    environ["RANK"], environ["WORLD_SIZE"] = str(ranks.rank), str(ranks.world)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    if ranks.launcher in ("srun", "mpi"):
        address = slurm_address(environ) if ranks.launcher == "srun" else mpi_address(environ)
        # What was exported stays: another name of that host may be the faster network.
        for name, value in zip(MASTER, address, strict=True):
            environ[name] = environ.get(name) or value
    # torchrun serves its own store at the port it gives, to a single rank too.
    elif ranks.launcher == "python" or not environ.get("MASTER_PORT"):
        environ["MASTER_ADDR"], environ["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    # Idle threads that spin would starve the other ranks of a shared CPU.
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environ.setdefault("TORCH_FR_BUFFER_SIZE", str(FLIGHT_RECORDER_SIZE))
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // max(1, ranks.local_world))))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- joining ------------------------------------------------------------------------------------


def join(ranks: Ranks, config: RunConfig | None = None) -> None:
    """Joins the process group of all ranks: nccl on GPUs, gloo on CPUs; every rank must call it.

    With a configuration the hosts compare what must be the same on all of them, see
    megagpt.cluster.agreement. Raises UsageError that names what differs; MegagptError that names
    ranks which did not come within meeting_minutes(config), and when the launcher died before.
    """
    parents = {"deepspeed": 2, "torchrun": 1, "mpi": 1}.get(ranks.launcher, 0)
    if any(map(_adopted, _above()[:parents])):
        raise MegagptError(
            f"rank {ranks.rank}: the launcher died while this rank started; run the command again"
        )
    if config is not None:
        # Ranks of one host read the same files, so one of them says the facts.
        speaks = ranks.local_rank == 0 and ranks.local_world < ranks.world
        meet(ranks, facts_of_run(config) if speaks else {}, meeting_minutes(config), config.output)
    elif not _meetings:
        meet(ranks, {}, MEETING_MINUTES)
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    set_device(ranks, n_gpus, os.environ)
    if n_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        keep_freed_memory()
    import deepspeed
    from deepspeed.utils import logger

    # Its news of memory and settings would bury the run's own lines; its warnings stay.
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # An extension for inference alone, which DeepSpeed would compile for a minute on CPUs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if n_gpus else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=GROUP_MINUTES),
        rank=ranks.rank,
        world_size=ranks.world,
    )


def meeting_minutes(config: RunConfig) -> float:
    """How long a rank that has come waits for the others."""
    log = config.log
    return log.meeting_minutes or min(MEETING_MINUTES, log.watchdog_minutes or MEETING_MINUTES)


def set_device(ranks: Ranks, n_gpus: int, environ: MutableMapping[str, str]) -> None:
    """Tells DeepSpeed which device it computes on; call before it is imported.

    n_gpus: GPUs that this process sees. SLURM's --gpus-per-task=1 shows each rank one GPU, its own,
    which is cuda:0 to all of them, while DeepSpeed binds cuda:LOCAL_RANK.
    """
    if n_gpus:
        environ["LOCAL_RANK"] = str(ranks.local_rank % n_gpus)
    else:
        environ.setdefault("DS_ACCELERATOR", "cpu")


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees for its next allocations; False without glibc.

    glibc takes every large tensor from the kernel anew and gives it back when it is freed, and
    trims what lies at the heap's end. A training step frees all of its activations, so each step
    the kernel zeroes gigabytes, page by page: a tenth of a step's time on CPUs
    (docs/benchmarks/model_step.md). The highest memory stays within a few percent of what it was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Nothing from mmap, whatever its size, and the heap's end is never given back.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def meet(ranks: Ranks, facts: Mapping[str, str], minutes: float, run: str = "") -> Meeting:
    """Returns when all ranks of `run` have come and their hosts agree in `facts`.

    Raises what Meeting and its agree() raise.
    """
    meeting = Meeting(ranks, minutes, run)
    # Before they agree: whatever ends the ranks from here on, one of them says it.
    _meetings.append(meeting)
    meeting.agree(facts, minutes)
    # The launching host's interface need not be that of another.
    master = os.environ["MASTER_ADDR"]
    choose_interface(ranks.rank, meeting.hosts, meeting.addresses, master, os.environ)
    return meeting


def share_folder(folder: Path) -> None:
    """See Meeting.share_folder; for ranks that have met."""
    _meetings[-1].share_folder(folder)


def long_work(alive: Callable[[], None]) -> LongWork:
    """Work that all ranks that have met begin together; `alive` is called as it goes on."""
    return LongWork(_meetings[-1], alive)


def _above() -> list[int]:
    """This process's parent and its parent, which is what started deepspeed's launcher, such as a
    connection by ssh."""
    parent = os.getppid()
    return [parent, *filter(None, [parent_of(parent)])]


def _adopted(parent: int) -> bool:
    """Whether the process `parent` takes in what other processes leave, and launches no ranks.

    In a container the launcher itself may be process 1.
    """
    try:
        words = psutil.Process(parent).cmdline()[:3]
    except psutil.Error:
        return False
    if words and os.path.basename(words[0].lower()) in REAPERS:
        return True
    return parent == 1 and not any(
        name in word.lower() for word in words for name in ("python", "torchrun")
    )


# --- the end ------------------------------------------------------------------------------------


def first_to_fail(wait_s: float = 10.0) -> bool:
    """Whether this rank is the first to call this, so that one rank reports what may stop all.

    Before the ranks meet they all read the same files, and rank 0 reports. The others give it
    `wait_s` seconds, within which the launcher ends them: if they ended first, the launcher would
    end rank 0 before it has spoken. One that is still there met an error of its own.
    """
    if _meetings:
        return _meetings[-1].first("failed")
    if told_rank(os.environ) != "0":
        time.sleep(wait_s)
    return True


def leave(clean: bool = True, wait_s: float = 5.0) -> None:
    """Leaves the process group; without it a rank now and then aborts at exit.

    clean: all ranks come here. Otherwise perhaps only this one does, and the others wait for it
    in the middle of a step: they are given `wait_s` seconds to come, and the launcher ends them.
    """
    if not _meetings:
        return
    import torch.distributed as dist

    if clean:
        dist.barrier()
    else:
        # A launcher that sees the first rank end signals the others, which would lose their codes.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not _meetings[-1].all_call("left", wait_s):
            return
    if dist.is_initialized():
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """Ends this process as sys.exit(code) does; one that joined others without Python's teardown.

    DeepSpeed keeps process groups beyond destroy_process_group(). Their threads now and then abort
    the teardown ("terminate called without an active exception", 6 of 25 exits of a process that
    keeps a gloo group), and the launcher calls a run that is done a failed one.
    """
    if _meetings:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)

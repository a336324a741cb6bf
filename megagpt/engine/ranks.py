"""Who am I among the ranks: found in the environment that the launcher left (L2).

`deepspeed` and `torchrun` set RANK and WORLD_SIZE; `srun` and `deepspeed --launcher slurm` leave
only SLURM's variables; plain `python -m megagpt.train` leaves none and is a world of one.
"""

import logging
import os
import socket
import time
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megagpt.errors import MegagptError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """One process's place: global rank of `world`, and its place on its own host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = "python"


def discover(environ: Mapping[str, str]) -> Ranks:
    """The place that the launcher gave this process.

    Raises UsageError when variables are missing or are not what their launcher would set.
    """
    if "RANK" in environ:
        missing = [k for k in ("WORLD_SIZE", "LOCAL_RANK") if k not in environ]
        if missing:
            raise UsageError(
                f"environment: RANK is set, but not {' and '.join(missing)}; start with "
                "deepspeed, torchrun or srun, or unset RANK for a single process"
            )
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
        on_host = "LOCAL_WORLD_SIZE" if launcher == "torchrun" else "LOCAL_SIZE"
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", on_host)
    elif _step_tasks(environ) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
        launcher = "srun"
    else:
        return Ranks()
    rank, world, local_rank = (_number(environ, name) for name in names[:3])
    if not 0 <= rank < world:
        raise UsageError(
            f"environment: {names[0]} = {rank} with {names[1]} = {world}: a rank must be at least "
            "0 and less than the number of ranks; two launchers may have been mixed"
        )
    missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if world > 1 and not environ.get(k)]
    if missing:
        raise UsageError(
            f"environment: {' and '.join(missing)} not set: the {world} ranks need the host name "
            "of rank 0 and a free port on it to find each other; export both before the launch"
        )
    local_world = _number(environ, names[3]) if environ.get(names[3]) else 0
    local_world = local_world or min(world, local_rank + 1)
    return Ranks(
        rank=rank, world=world, local_rank=local_rank, local_world=local_world, launcher=launcher
    )


def _step_tasks(environ: Mapping[str, str]) -> int:
    """Processes that srun started together; 1 outside srun.

    A batch script has SLURM_NTASKS and SLURM_PROCID too, yet what it starts by itself is one
    process; only srun sets the step's own variables.
    """
    return _number(environ, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environ else 1


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdigit():
        raise UsageError(f"environment: {name} = {value!r}: must be a whole number, 0 or more")
    return int(value)


def prepare_environment(ranks: Ranks, environ: MutableMapping[str, str]) -> None:
    """Sets what torch and DeepSpeed read from the environment; call before importing either."""
    environ["RANK"], environ["WORLD_SIZE"] = str(ranks.rank), str(ranks.world)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    # torchrun serves its own store at the port it gives, to a single rank too.
    if ranks.launcher == "python" or not environ.get("MASTER_PORT"):
        environ["MASTER_ADDR"], environ["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    # Idle threads that spin would starve the other ranks of a shared CPU.
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // max(1, ranks.local_world))))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(ranks: Ranks, minutes: float = 30.0) -> None:
    """Joins the process group of all ranks: nccl on GPUs, gloo on CPUs; every rank must call it.

    Raises MegagptError when the launcher died before: torch would look for it for `minutes`.
    """
    if ranks.launcher in ("deepspeed", "torchrun") and _adopted(os.getppid()):
        raise MegagptError(
            f"rank {ranks.rank}: the launcher died while this rank started; run the command again"
        )
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    # Its news of memory and settings would bury the run's own lines; its warnings stay.
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    # An extension for inference alone, which DeepSpeed would compile for a minute on CPUs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=minutes),
        rank=ranks.rank,
        world_size=ranks.world,
    )


def _adopted(parent: int) -> bool:
    """Whether the process `parent` takes in what other processes leave, and launches no ranks.

    In a container the launcher itself may be process 1.
    """
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().lower().split(b"\0")
    except OSError:
        return False
    program = os.path.basename(words[0].decode(errors="replace"))
    if program in _REAPERS:
        return True
    return parent == 1 and not any(b"python" in w or b"torchrun" in w for w in words[:3])


_REAPERS = ("init", "systemd", "tini", "dumb-init", "docker-init", "containerd-shim-runc-v2")
"""Programs that Linux hands orphans to."""


def first_to_fail(wait_s: float = 10.0) -> bool:
    """Whether this rank is the first to call this, so that one rank reports what may stop all.

    Before the group is joined all ranks read the same files, and rank 0 reports. The others give
    it `wait_s` seconds, within which the launcher ends them: if they ended first, the launcher
    would end rank 0 before it has spoken. One that is still there met an error of its own.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        if os.environ.get("RANK", "0") != "0":
            time.sleep(wait_s)
        return True
    try:
        return bool(_store().add("megagpt/failed", 1) == 1)
    except RuntimeError:
        # The rank that kept the store is gone; better said twice than never.
        return True


def leave(clean: bool = True, wait_s: float = 5.0) -> None:
    """Leaves the process group; without it a rank now and then aborts at exit.

    clean: all ranks come here. Otherwise perhaps only this one does, and the others wait for it
    in the middle of a step: they are given `wait_s` seconds to come, and the launcher ends them.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    if clean:
        dist.barrier()
    elif not _all_left(wait_s):
        return
    dist.destroy_process_group()


def _store() -> Any:
    """The key-value store through which the ranks found each other; needs no collective."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _all_left(wait_s: float) -> bool:
    """Whether every rank calls this within `wait_s` seconds."""
    import torch.distributed as dist

    try:
        _store().set(f"megagpt/left/{dist.get_rank()}", "")
        names = [f"megagpt/left/{rank}" for rank in range(dist.get_world_size())]
        _store().wait(names, timedelta(seconds=wait_s))
    except RuntimeError:
        return False
    return True

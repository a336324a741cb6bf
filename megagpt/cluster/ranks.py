"""Who am I among the ranks: found in the environment that the launcher left (L2, no torch).

`deepspeed` and `torchrun` set RANK and WORLD_SIZE; `srun` and `deepspeed --launcher slurm` leave
only SLURM's variables, which say where rank 0 is too; MPI's launchers leave theirs
(megagpt.cluster.mpi); plain `python -m megagpt.train` leaves none and is a world of one.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megagpt.cluster.mpi import Marks, marks_of, mpi_address, unknown_world
from megagpt.cluster.slurm import expand_counts, expand_hosts
from megagpt.errors import UsageError

MASTER = ("MASTER_ADDR", "MASTER_PORT")
"""Host name of rank 0 and the TCP port there at which the ranks find each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Which process this is: its rank of all `world`, and its rank among those of its host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = "python"


def discover(environ: Mapping[str, str]) -> Ranks:
    """The ranks that the launcher left in the environment.

    Raises UsageError when variables are missing, are not what their launcher would set, or
    contradict each other.
    """
    tasks = _step_tasks(environ)
    if "RANK" in environ:
        ranks = _from_variables(environ, "srun" if tasks > 1 else "deepspeed")
    elif marks_of(environ):
        ranks = _from_mpi(environ)
    else:
        ranks = _from_slurm(environ) if tasks > 1 else Ranks()
    if ranks.world == 1:
        _check_alone(environ, ranks.launcher)
    if not ranks.rank < ranks.world or not ranks.local_rank < ranks.local_world:
        raise UsageError(
            f"environment: rank {ranks.rank} of {ranks.world}, rank {ranks.local_rank} of "
            f"{ranks.local_world} on this host (by {ranks.launcher}): a rank must be less than the "
            "number of ranks; two launchers may have been mixed"
        )
    if tasks > 1:
        _check_against_slurm(ranks, environ)
    known = mpi_address(environ) if ranks.launcher == "mpi" else ("", "")
    missing = [name for name, by_job in zip(MASTER, known, strict=True) if not by_job]
    missing = [name for name in missing if ranks.world > 1 and not environ.get(name)]
    if missing and ranks.launcher != "srun":
        raise UsageError(
            f"environment: {' and '.join(missing)} not set: the {ranks.world} ranks need the host "
            "name of rank 0 and a free port on it to find each other; export both before the launch"
        )
    if environ.get("MASTER_PORT") and ranks.world > 1:
        if not 0 < _number(environ, "MASTER_PORT") < 65536:
            raise UsageError(
                f"environment: MASTER_PORT = {environ['MASTER_PORT']}: must lie between 1 and 65535"
            )
    return ranks


def _from_variables(environ: Mapping[str, str], launcher: str) -> Ranks:
    """The ranks by RANK and its like; `launcher` where no launcher left its own mark."""
    missing = [k for k in ("WORLD_SIZE", "LOCAL_RANK") if k not in environ]
    if missing:
        raise UsageError(
            f"environment: RANK is set, but not {' and '.join(missing)}; start with "
            "deepspeed, torchrun or srun, or unset RANK for a single process"
        )
    for mark, name in _MARKS.items():
        launcher = name if mark in environ else launcher
    on_host = "LOCAL_SIZE" if launcher == "deepspeed" else "LOCAL_WORLD_SIZE"
    marks = Marks(launcher, "RANK", "WORLD_SIZE", "LOCAL_RANK", on_host)
    return _ranks(environ, marks, launcher)


def _ranks(environ: Mapping[str, str], marks: Marks, launcher: str) -> Ranks:
    """The ranks by the variables of these names. A launcher that does not tell how many share this
    host has at least as many there as this one's place on it says."""
    world, local_rank = _number(environ, marks.size), 0
    if environ.get(marks.local_rank) or launcher != "mpi":
        local_rank = _number(environ, marks.local_rank)
    local_world = min(world, local_rank + 1)
    if environ.get(marks.local_size):
        local_world = _number(environ, marks.local_size)
    return Ranks(
        rank=_number(environ, marks.rank),
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        launcher=launcher,
    )


_MARKS = {"CROSS_SIZE": "deepspeed", "GROUP_WORLD_SIZE": "torchrun"}
"""Hosts of the run, as each launcher calls them -> the launcher."""


def _from_mpi(environ: Mapping[str, str]) -> Ranks:
    """The ranks by the variables of an MPI launcher; one process of it is a world of its own."""
    marks = marks_of(environ)
    assert marks is not None
    if not environ.get(marks.size):
        raise UsageError(
            f"environment: {marks.rank} is set, but not {marks.size}, as {marks.name} sets it; "
            "export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for every process"
        )
    return Ranks() if _number(environ, marks.size) == 1 else _ranks(environ, marks, "mpi")


def _check_alone(environ: Mapping[str, str], launcher: str) -> None:
    """Raises UsageError where variables tell of more processes than this one."""
    found = unknown_world(environ)
    if launcher == "python":
        # Of a shell that was itself started by a launcher.
        for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
            if environ.get(name, "1") not in ("", "1"):
                found = f"{name} = {environ[name]}"
    if found:
        raise UsageError(
            f"environment: {found:.300}, but nothing that is known here tells this process of "
            "others: every process would train by itself; export RANK, WORLD_SIZE, LOCAL_RANK, "
            "MASTER_ADDR and MASTER_PORT for every process, or unset what another launch has left"
        )


def told_rank(environ: Mapping[str, str]) -> str:
    """The rank as a launcher tells it, before anything is checked; "0" where none does."""
    marks = marks_of(environ)
    by_mpi = environ.get(marks.rank) if marks else ""
    return environ.get("RANK") or by_mpi or environ.get("SLURM_PROCID") or "0"


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    """The ranks by the variables of SLURM's step."""
    marks = Marks("SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    ranks = _ranks(environ, marks, "srun")
    if not environ.get("SLURM_STEP_TASKS_PER_NODE"):
        return ranks
    counts = expand_counts(environ["SLURM_STEP_TASKS_PER_NODE"])
    host = min(_number(environ, "SLURM_NODEID"), len(counts) - 1)
    return replace(ranks, local_world=counts[host])


def _check_against_slurm(ranks: Ranks, environ: Mapping[str, str]) -> None:
    """Raises UsageError where the ranks do not fit the step of SLURM that they run in."""
    tasks = _step_tasks(environ)
    for mark, launcher in _MARKS.items():
        if ranks.launcher == launcher and environ.get(mark, str(tasks)) != str(tasks):
            raise UsageError(
                f"environment: srun started {tasks} tasks, but {launcher} counts {environ[mark]} "
                f"({mark}); srun must start {launcher} once on each host (--ntasks-per-node=1) "
                "and give all of them the same number of hosts and the same address to meet at"
            )
    if ranks.launcher != "srun":
        return
    pairs = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    for name, by_slurm in pairs:
        if environ.get(name) and _number(environ, name) != _number(environ, by_slurm):
            raise UsageError(
                f"environment: {name} = {environ[name]}, but {by_slurm} = {environ[by_slurm]}; "
                f"srun gives each task its place by itself: unset {name} before srun"
            )


def _step_tasks(environ: Mapping[str, str]) -> int:
    """Processes that srun started together; 1 outside srun.

    A batch script has SLURM_NTASKS and SLURM_PROCID too, yet what it starts by itself is one
    process; only srun sets the step's own variables.
    """
    return _number(environ, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environ else 1


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not re.fullmatch(r"\d{1,9}", value, re.ASCII):
        raise UsageError(f"environment: {name} = {value!r:.100}: must be a whole number, 0 or more")
    return int(value)


def slurm_address(environ: Mapping[str, str]) -> tuple[str, str]:
    """(host, port) where the ranks of a step meet: its first host, where SLURM puts rank 0.

    The port follows from job and step, so that two steps on one host do not meet each other; it
    lies below 32768, from where on Linux hands ports out.
    """
    hosts = expand_hosts(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", ""))
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    return hosts[0], str(20000 + (8 * job + step) % 12000)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

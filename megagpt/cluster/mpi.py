"""What other launchers than our own leave in the environment of a process (L2, no torch).

| launcher | rank and number of ranks |
|---|---|
| Open MPI's mpirun, Spectrum MPI's jsrun | OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE |
| jsrun without MPI | JSM_NAMESPACE_RANK, JSM_NAMESPACE_SIZE |
| MVAPICH's mpirun_rsh | MV2_COMM_WORLD_RANK, MV2_COMM_WORLD_SIZE |
| Cray's PALS | PALS_RANKID, and PMI_SIZE |
| Flux | FLUX_TASK_RANK, FLUX_JOB_SIZE |
| MPICH's and Intel's mpiexec | PMI_RANK, PMI_SIZE |

None of them says where rank 0 is. Its host is the first of the batch system's list of hosts.
"""

import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Marks(NamedTuple):
    """The names of the variables of a launcher; local ones may be missing."""

    name: str
    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""


def _alike(name: str, prefix: str) -> Marks:
    words = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return Marks(name, *(prefix + word for word in words))


LAUNCHERS = (
    _alike("Open MPI", "OMPI_COMM_WORLD_"),
    _alike("jsrun", "JSM_NAMESPACE_"),
    _alike("MVAPICH", "MV2_COMM_WORLD_"),
    Marks("PALS", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PMI_LOCAL_SIZE"),
    Marks("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    Marks("Hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""The first whose rank is there counts: a Cray has PMI's variables too."""
JOBS = (
    *("PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "COBALT_JOBID", "SLURM_JOB_ID"),
    *("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_PORT", "PALS_APID"),
)
"""Variables that name a job, or a launcher's run within it, alike on all ranks."""
HOSTS = ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "COBALT_NODEFILE")
"""Variables that name a file with the hosts of a batch system's job, a line for each or more."""


def marks_of(environ: Mapping[str, str]) -> Marks | None:
    """The launcher that started this process, None for none that is known.

    SLURM's srun sets PMI's variables too where it is told to; its own say more.
    """
    for marks in LAUNCHERS:
        if environ.get(marks.rank):
            by_srun = marks.name == "Hydra" and marks.local_rank not in environ
            return None if by_srun and "SLURM_STEP_NUM_TASKS" in environ else marks
    return None


def unknown_world(environ: Mapping[str, str]) -> str:
    """A pair such as X_RANK = 3, X_SIZE = 8 that a launcher must have left which is not known here;
    "" where no variables tell of more than one process."""
    for name, value in environ.items():
        # How many share a host says nothing.
        match = re.fullmatch(r"(\w+?)(?<!LOCAL)(?<!SLURM)_(RANK|RANKID|PROCID)", name)
        for end in ("SIZE", "WORLD_SIZE", "NTASKS", "NPROCS") if match and value.isdigit() else ():
            assert match is not None
            size = environ.get(f"{match[1]}_{end}", "")
            if size.isdigit() and size.lstrip("0") > "1":
                return f"{name} = {value}, {match[1]}_{end} = {size}"
    rank = environ.get("PMIX_RANK", "0")
    return f"PMIX_RANK = {rank}" if rank.isdigit() and rank.strip("0") else ""


def mpi_address(environ: Mapping[str, str]) -> tuple[str, str]:
    """(host, port) where the ranks of an MPI launcher meet; "" for what is not known.

    The port follows from the names of the job and of the launcher's own run, which are the same for
    all ranks; it lies below 32768, from where on Linux hands ports out.
    """
    marks = marks_of(environ)
    host = next((found for name in HOSTS if (found := _first_host(environ.get(name, "")))), "")
    job = " ".join(environ[name] for name in JOBS if environ.get(name))
    if marks and environ.get(marks.local_size) == environ.get(marks.size):
        # All on this host: their common parent names the run, where nothing else does.
        host, job = "127.0.0.1", job or str(os.getppid())
    # Not Python's hash, which differs between processes.
    return host, str(20000 + zlib.crc32(job.encode()) % 12000) if job else ""


def _first_host(path: str) -> str:
    """The first host of a file that computes: LSF lists the one of the batch script before them."""
    try:
        names = Path(path).read_text().split() if path else []
    except (OSError, UnicodeDecodeError):
        return ""
    return next((name for name in names if not name.startswith(("batch", "login"))), "")

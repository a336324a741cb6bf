"""Is this host fit to train: versions, GPUs, network, limits (torch only where there are GPUs)."""

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megagpt.check.doctor import network
from megagpt.check.doctor.check import FAIL, OK, WARN, Check

SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm that NCCL's documentation recommends; containers often have 64 MiB."""
FILES = 1024
"""Open files: 128 shards of each corpus, and a socket or several to every other rank."""
LOCKED = 1 << 30
"""Bytes that InfiniBand may have to lock; anything less than unlimited is asking for trouble."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a host is told of the job; 0 where nothing is known."""

    hosts: int = 1
    ranks: int = 0
    """Of the whole job."""
    ranks_here: int = 0
    master: str = ""
    """Host name or address of rank 0."""
    nonce: tuple[str, str] = ("", "")
    """Path and content of a file that was just written, which every host must see; or empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    memory_mib: int
    errors: int
    """Uncorrected memory errors since the driver was loaded."""


def check_host(place: Place, cards: list[Gpu], environ: Mapping[str, str]) -> Iterator[Check]:
    """All checks that need no run file, and every package."""
    yield check_gpus(cards, place.ranks_here)
    yield check_cores(place.ranks_here, len(os.sched_getaffinity(0)))
    yield network.check_interface(network.look(place.master), place.hosts, environ, bool(cards))
    yield check_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if cards:
        yield check_shared_memory(shutil.disk_usage("/dev/shm").total)
    ports = network.infiniband_ports()
    if ports:
        yield network.check_infiniband(ports, environ)
        yield check_locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    if place.nonce[0]:
        yield check_nonce(*place.nonce)


# --- versions -----------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    """Package -> version that megagpt was tested with, from its installed metadata."""
    try:
        required = metadata.requires("megagpt") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.fullmatch(r"([\w.-]+)\s*==\s*([\w.]+)", one) for one in required)
    return {match[1]: match[2] for match in found if match}


def installed() -> dict[str, str]:
    """Package -> version of every pinned package that is there."""
    found = {}
    for name in pins():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_versions(there: Mapping[str, str], wanted: Mapping[str, str]) -> Check:
    """Every pinned package is there, in the version that was tested (build labels do not count)."""
    if not wanted:
        return Check(
            "versions",
            WARN,
            "megagpt is not installed, so its pins are not known",
            "pip install --no-deps -e . in the checkout",
        )
    missing = [name for name in wanted if name not in there]
    if missing:
        remedy = "pip install " + " ".join(f"{name}=={wanted[name]}" for name in missing)
        return Check("versions", FAIL, f"{', '.join(missing)} missing", remedy)
    other = [name for name in wanted if there[name].split("+")[0] != wanted[name]]
    if other:
        return Check(
            "versions",
            WARN,
            ", ".join(f"{name} {there[name]} (tested: {wanted[name]})" for name in other),
            "pip install " + " ".join(f"{name}=={wanted[name]}" for name in other),
        )
    first = ", ".join(f"{name} {there[name]}" for name in list(wanted)[:2])
    return Check("versions", OK, f"{first} and {len(wanted) - 2} more, as pinned")


# --- GPUs and cores -----------------------------------------------------------------------------


def gpus() -> list[Gpu]:
    """The GPUs that NVIDIA's driver lists; none where there is no driver."""
    fields = "name,memory.total,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(text: str) -> list[Gpu]:
    """nvidia-smi's lines `name, MiB, errors`; a GPU without error correction says [N/A]."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [
        Gpu(
            name=row[0],
            memory_mib=int(row[1]) if row[1].isdigit() else 0,
            errors=int(row[2]) if row[2].isdigit() else 0,
        )
        for row in rows
        if len(row) == 3
    ]


def check_gpus(cards: list[Gpu], ranks_here: int) -> Check:
    """One GPU a rank, without memory errors, usable by this torch."""
    if not cards:
        return Check("GPUs", OK, "none: ranks train on the CPU")
    bad = [str(i) for i, card in enumerate(cards) if card.errors]
    if bad:
        return Check(
            "GPUs",
            FAIL,
            f"GPU {', '.join(bad)}: uncorrected memory errors",
            "drain the host, reset these GPUs, replace those where the errors return",
        )
    import torch

    if not torch.cuda.is_available():
        why = "is a build without CUDA" if torch.version.cuda is None else "cannot use the driver"
        return Check(
            "GPUs",
            FAIL,
            f"{len(cards)} x {cards[0].name}, but torch {torch.__version__} {why}",
            "install the torch build for this driver's CUDA version, or update the driver",
        )
    visible = torch.cuda.device_count()
    if ranks_here > visible:
        return Check(
            "GPUs",
            FAIL,
            f"{ranks_here} ranks on {visible} visible GPUs",
            "start as many ranks a host as it has GPUs; look at CUDA_VISIBLE_DEVICES",
        )
    memory = min(card.memory_mib for card in cards) / 1024
    return Check("GPUs", OK, f"{visible} x {cards[0].name}, {memory:.0f} GiB")


def check_cores(ranks_here: int, cores: int) -> Check:
    """A core at least for every rank."""
    if ranks_here > cores:
        return Check(
            "cores",
            WARN,
            f"{ranks_here} ranks share {cores} cores",
            "start fewer ranks here, or ask the scheduler for more cores a task",
        )
    return Check("cores", OK, f"{cores}")


# --- limits -------------------------------------------------------------------------------------


def check_files(limit: int) -> Check:
    """Open files that a process may have."""
    if 0 <= limit < FILES:
        return Check(
            "open files",
            FAIL,
            f"ulimit -n is {limit}, {FILES} are needed",
            "ulimit -n 65536 before the launch, or raise nofile in /etc/security/limits.conf",
        )
    return Check("open files", OK, _limit(limit))


def check_locked(limit: int) -> Check:
    """Memory that InfiniBand may lock, in bytes."""
    if 0 <= limit < LOCKED:
        return Check(
            "locked memory",
            FAIL,
            f"ulimit -l is {limit // 1024} KiB, and InfiniBand locks its buffers",
            "ulimit -l unlimited, memlock in /etc/security/limits.conf, or "
            "LimitMEMLOCK=infinity for slurmd",
        )
    return Check("locked memory", OK, _limit(limit))


def _limit(limit: int) -> str:
    return "unlimited" if limit < 0 else f"{limit:,}"


def check_shared_memory(size: int) -> Check:
    """Size of /dev/shm, through which the ranks of a host exchange data, in bytes."""
    if size < SHARED_MEMORY:
        return Check(
            "/dev/shm",
            FAIL,
            f"{size / 2**20:,.0f} MiB, NCCL wants 1 GiB",
            "start the container with --shm-size=8g or --ipc=host, or remount /dev/shm larger",
        )
    return Check("/dev/shm", OK, f"{size / 2**30:,.0f} GiB")


# --- shared file system -------------------------------------------------------------------------


def check_nonce(name: str, content: str) -> Check:
    """This host sees the file that another has just written."""
    path = Path(name)
    try:
        # Network file systems may show a new name only once the folder was listed anew.
        os.listdir(path.parent)
        seen = path.read_text() == content
        why = "" if seen else "other content than was written"
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        return Check(
            "shared files",
            FAIL,
            f"{path.parent}: a file that another host wrote there: {why}",
            "mount the same file system there on every host, or set `output` to a folder that "
            "all hosts share",
        )
    return Check("shared files", OK, f"{path.parent}")

"""Is this host fit to train: versions, GPUs, cores, limits (torch only where there are GPUs)."""

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megagpt.check.findings import FAIL, OK, WARN, Check, Order
from megagpt.cluster.ranks import cores

AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
"""The topology as AMD's driver shows it."""
SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm that NCCL's documentation recommends; containers often have 64 MiB."""
FILES = 1024
"""Open files: 128 shards of each corpus, and a socket or several to every other rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    memory_mib: int
    errors: int
    """Uncorrected memory errors since the driver was loaded."""


def check_machine(order: Order, cards: list[Gpu]) -> Iterator[Check]:
    """All checks that need neither a network nor a run file."""
    yield check_gpus(cards, order.ranks_here, order.gpus_per_node)
    yield check_cores(order.ranks_here, cores())
    yield check_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if cards:
        yield check_shared_memory(shutil.disk_usage("/dev/shm").total)
    path, content = order.shared_file
    if path:
        yield check_shared_file(Path(path), content)


# --- versions -----------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    """Package -> version that megagpt was tested with, from its installed metadata."""
    try:
        required = metadata.requires("megagpt") or []
    except metadata.PackageNotFoundError:
        return {}
    matches = (re.fullmatch(r"([\w.-]+)\s*==\s*([\w.]+)", line) for line in required)
    return {match[1]: match[2] for match in matches if match}


def installed() -> dict[str, str]:
    """Package -> version of every pinned package that is there."""
    versions = {}
    for name in pins():
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def check_versions(there: Mapping[str, str], wanted: Mapping[str, str]) -> Check:
    """Every pinned package is there, in the version that was tested (build labels do not count)."""
    if not wanted:
        detail = "megagpt is not installed, so its pins are not known"
        return Check("versions", WARN, detail, "pip install --no-deps -e . in the checkout")
    missing = [name for name in wanted if name not in there]
    other = [name for name in wanted if name in there and there[name].split("+")[0] != wanted[name]]
    remedy = "pip install " + " ".join(f"{name}=={wanted[name]}" for name in missing or other)
    if missing:
        return Check("versions", FAIL, f"{', '.join(missing)} missing", remedy)
    if other:
        detail = ", ".join(f"{name} {there[name]} (tested: {wanted[name]})" for name in other)
        return Check("versions", WARN, detail, remedy)
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
    cards = []
    for line in text.splitlines():
        name, *counts = (cell.strip() for cell in line.split(","))
        if len(counts) == 2:
            memory, errors = (int(count) if count.isdigit() else 0 for count in counts)
            cards.append(Gpu(name=name, memory_mib=memory, errors=errors))
    return cards


def amd_gpus(nodes: Path) -> int:
    """GPUs that AMD's driver lists in AMD_NODES; a node that is a CPU has the number 0."""
    return sum(path.read_text().strip() != "0" for path in nodes.glob("*/gpu_id"))


def check_gpus(cards: list[Gpu], ranks_here: int, wanted: int = 0) -> Check:
    """One GPU a rank, without memory errors, usable by this torch; `wanted` by a job to come."""
    if len(cards) < wanted:
        detail = f"{len(cards) or 'none'} on this host, the job wants {wanted} on each of its hosts"
        remedy = "examine those too, within the job: srun python -m megagpt.doctor RUN.toml"
        return Check("GPUs", WARN, detail, remedy)
    if not cards and (count := amd_gpus(AMD_NODES)):
        import torch

        visible = torch.cuda.device_count() if torch.version.hip else 0
        if visible:
            detail = (
                f"{visible} of AMD, by torch {torch.__version__}; their errors are not looked at"
            )
            return Check("GPUs", WARN, detail, "read rocm-smi --showrasinfo")
        detail = f"{count} of AMD, but torch {torch.__version__} is a build without ROCm"
        return Check("GPUs", FAIL, detail, "install the torch build for this ROCm version")
    if not cards:
        return Check("GPUs", OK, "none: ranks train on the CPU")
    bad = [str(i) for i, card in enumerate(cards) if card.errors]
    if bad:
        detail = f"GPU {', '.join(bad)}: uncorrected memory errors"
        remedy = "drain the host, reset these GPUs, replace those where the errors return"
        return Check("GPUs", FAIL, detail, remedy)
    import torch

    if not torch.cuda.is_available():
        why = "is a build without CUDA" if torch.version.cuda is None else "cannot use the driver"
        detail = f"{len(cards)} x {cards[0].name}, but torch {torch.__version__} {why}"
        remedy = "install the torch build for this driver's CUDA version, or update the driver"
        return Check("GPUs", FAIL, detail, remedy)
    visible = torch.cuda.device_count()
    if ranks_here > visible:
        detail = f"{ranks_here} ranks on {visible} visible GPUs"
        remedy = "start as many ranks a host as it has GPUs; look at CUDA_VISIBLE_DEVICES"
        return Check("GPUs", FAIL, detail, remedy)
    memory = min(card.memory_mib for card in cards) / 1024
    return Check("GPUs", OK, f"{visible} x {cards[0].name}, {memory:.0f} GiB")


def check_cores(ranks_here: int, cores: int) -> Check:
    """A core at least for every rank."""
    if ranks_here > cores:
        remedy = "start fewer ranks here, or ask the scheduler for more cores a task"
        return Check("cores", WARN, f"{ranks_here} ranks share {cores} cores", remedy)
    return Check("cores", OK, f"{cores}")


# --- limits and files ---------------------------------------------------------------------------


def check_files(limit: int) -> Check:
    """Open files that a process may have."""
    if 0 <= limit < FILES:
        detail = f"ulimit -n is {limit}, {FILES} are needed"
        remedy = "ulimit -n 65536 before the launch, or raise nofile in /etc/security/limits.conf"
        return Check("open files", FAIL, detail, remedy)
    return Check("open files", OK, "unlimited" if limit < 0 else f"{limit:,}")


def check_shared_memory(size: int) -> Check:
    """Size of /dev/shm, through which the ranks of a host exchange data, in bytes."""
    if size < SHARED_MEMORY:
        detail = f"{size / 2**20:,.0f} MiB, NCCL wants 1 GiB"
        remedy = "start the container with --shm-size=8g or --ipc=host, or remount /dev/shm larger"
        return Check("/dev/shm", FAIL, detail, remedy)
    return Check("/dev/shm", OK, f"{size / 2**30:,.0f} GiB")


def check_shared_file(path: Path, content: str) -> Check:
    """This host sees the file that another has just written."""
    try:
        # Network file systems may show a new name only once the folder was listed anew.
        os.listdir(path.parent)
        why = "" if path.read_text() == content else "other content than was written"
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        detail = f"{path.parent}: a file that another host wrote there: {why}"
        remedy = (
            "mount the same file system there on every host, or set `output` to a folder that "
            "all hosts share"
        )
        return Check("shared files", FAIL, detail, remedy)
    return Check("shared files", OK, f"{path.parent}")

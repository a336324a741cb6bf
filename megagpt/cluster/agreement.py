"""What must be the same on every host before they train together (L2; torch for its devices alone).

Each rank says the facts of its host, rank 0 compares them and names what differs, and where. An
older copy of the code, another run file or a shard that one host lacks would otherwise train a
different run, or end this one in the middle with a message that says nothing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megagpt.config import RunConfig, dump_run
from megagpt.corpus.manifest import CorpusManifest, read_manifest
from megagpt.errors import MegagptError
from megagpt.log.environment import versions
from megagpt.plan.ds_config import read_ds_config

PACKAGE = Path(__file__).resolve().parents[1]
DRIVER = "the driver of the GPUs"
DRIVERS = {"NVIDIA": Path("/sys/module/nvidia/version"), "AMD": Path("/sys/module/amdgpu/version")}
"""Where a driver tells its version."""
TOLERATED = (DRIVER,)
"""Facts in which hosts may differ for a while, as when a site renews its drivers: only told."""
COMPUTING = ("torch", "deepspeed", "numpy")
"""Packages whose version decides what is computed."""
MOST_HOSTS = 4
"""Hosts that a message names."""


def facts_of_code() -> dict[str, str]:
    """What computes on this host, whatever the run: name, as a message calls it -> value."""
    known = versions(*COMPUTING)
    facts = {"the code of megagpt": _short(code_digest()), "python": known["python"]}
    return facts | {name: known.get(name, "not installed") for name in COMPUTING}


def facts_of_devices(drivers: Mapping[str, Path] = DRIVERS) -> dict[str, str]:
    """The GPUs' driver on this host, and with one the CUDA or ROCm and the NCCL that torch has."""
    found = {name: path.read_text().strip() for name, path in drivers.items() if path.exists()}
    facts = {DRIVER: ", ".join(f"{name} {version}" for name, version in found.items()) or "none"}
    if found:
        import torch

        facts["CUDA or ROCm"] = str(torch.version.cuda or torch.version.hip)
        has_nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "none"
    return facts


def facts_of_run(config: RunConfig) -> dict[str, str]:
    """What holds on this host; of the shards only that they are there, with the right sizes."""
    ds_config = json.dumps(read_ds_config(config.parallel.ds_config), sort_keys=True)
    sources = [*config.data.train, *config.data.validation]
    return {
        **facts_of_code(),
        **facts_of_devices(),
        "the run file with its overrides": _short(_sha256(dump_run(config))),
        f"DeepSpeed's {config.parallel.ds_config}": _short(_sha256(ds_config)),
        **{source.path: _corpus(Path(source.path)) for source in sources},
    }


def disagreements(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> list[str]:
    """One sentence for each fact that is not the same everywhere; [] when all agree.

    hosts, facts: of every rank; of the ranks on one host only one need know the facts.
    """
    problems = []
    for name in dict.fromkeys(name for said in facts for name in said):
        hosts_of: dict[str, list[str]] = {}
        for host, said in zip(hosts, facts, strict=True):
            if name in said:
                hosts_of.setdefault(said[name], []).append(host)
        if len(hosts_of) > 1:
            values = (f"{value} on {_names(where)}" for value, where in hosts_of.items())
            problems.append(f"{name} is not the same on all hosts: {'; '.join(values)}")
    return problems


def code_digest(folder: Path = PACKAGE) -> str:
    """sha256, in hex, over names and bytes of every .py file below `folder`, in order of name.

    Versions do not tell: an edited checkout keeps its number.
    """
    digest = hashlib.sha256()
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name, path in sorted(names.items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _corpus(folder: Path) -> str:
    """What a folder of shards is on this host, or the first thing that is wrong with it."""
    try:
        manifest = read_manifest(folder)
    except MegagptError as error:
        return str(error).partition(";")[0]
    sums = " ".join(f"{s.name} {s.sha256}{s.mask_sha256}" for s in manifest.shards)
    return _incomplete(manifest) or f"{len(manifest.shards)} shards {_short(_sha256(sums))}"


def _incomplete(manifest: CorpusManifest) -> str:
    """The first shard that is missing or not of its size, "" when there is none."""
    for shard in manifest.shards:
        for path, expected, _ in manifest.files(shard):
            try:
                size = path.stat().st_size
            except OSError as error:
                return f"{error.filename} cannot be read ({error.strerror})"
            if expected not in (None, size):
                return f"{path} has {size} bytes of {expected}"
    return ""


def _names(hosts: Sequence[str]) -> str:
    """The first few hosts, each once."""
    once = list(dict.fromkeys(hosts))
    more = f" and {len(once) - MOST_HOSTS} more" if len(once) > MOST_HOSTS else ""
    return ", ".join(once[:MOST_HOSTS]) + more


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(digest: str) -> str:
    """Enough of a digest for people to compare."""
    return f"sha256 {digest[:12]}"

"""What must be the same on every host before they train together (L1, no torch).

Each rank says its facts, one compares them and names what differs, and where. An older copy of the
code, another run file or a shard that one host lacks would otherwise train a different run, or end
this one in the middle with a message that says nothing.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megagpt.cluster.code import code_digest
from megagpt.config import RunConfig, dump_run
from megagpt.corpus.manifest import CorpusManifest, read_manifest
from megagpt.errors import MegagptError
from megagpt.plan.ds_config import read_ds_config

Facts = Mapping[str, str]
"""Name of a fact, as a message calls it -> what holds on this host."""
COMPUTING = ("torch", "deepspeed", "numpy")
"""Packages whose version decides what is computed."""


def facts_of_code() -> dict[str, str]:
    """What computes on this host, whatever the run."""
    found = {"the code of megagpt": _short(code_digest()), "python": sys.version.split()[0]}
    return found | {name: _version(name) for name in COMPUTING}


def facts(config: RunConfig) -> dict[str, str]:
    """What holds on this host; of the shards only that they are there, with the right sizes."""
    found = facts_of_code()
    found["the run file with its overrides"] = _short(_digest(dump_run(config).encode()))
    tree = json.dumps(read_ds_config(config.parallel.ds_config), sort_keys=True)
    found[f"DeepSpeed's {config.parallel.ds_config}"] = _short(_digest(tree.encode()))
    sources = [*config.data.train, *config.data.validation]
    return found | {source.path: _corpus(Path(source.path)) for source in sources}


def disagreements(hosts: Sequence[str], said: Sequence[Facts]) -> list[str]:
    """One sentence for each fact that is not the same everywhere; [] when all agree.

    hosts, said: of every rank; of the ranks on one host only one need know the facts.
    """
    names = dict.fromkeys(name for facts in said for name in facts)
    found = []
    for name in names:
        places: dict[str, list[str]] = {}
        for host, facts in zip(hosts, said, strict=True):
            if name in facts:
                places.setdefault(facts[name], []).append(host)
        if len(places) > 1:
            told = (f"{value} on {_hosts(where)}" for value, where in places.items())
            found.append(f"{name} is not the same on all hosts: {'; '.join(told)}")
    return found


def _hosts(names: Sequence[str]) -> str:
    """The first few hosts, each once."""
    once = list(dict.fromkeys(names))
    return ", ".join(once[:4]) + (f" and {len(once) - 4} more" if len(once) > 4 else "")


def _corpus(folder: Path) -> str:
    """What a folder of shards is on this host."""
    try:
        manifest = read_manifest(folder)
    except MegagptError as error:
        return str(error).partition(";")[0]
    sums = " ".join(f"{shard.name} {shard.sha256}" for shard in manifest.shards)
    alike = f"{len(manifest.shards)} shards {_short(_digest(sums.encode()))}"
    return _incomplete(manifest) or alike


def _incomplete(manifest: CorpusManifest) -> str:
    """The first shard that is missing or not of its size, "" when there is none."""
    for shard in manifest.shards:
        path = manifest.bin_path(shard)
        try:
            size = path.stat().st_size
            manifest.index_path(shard).stat()
        except OSError as error:
            return f"{error.filename} cannot be read ({error.strerror})"
        if size != shard.bytes:
            return f"{path} has {size} bytes of {shard.bytes}"
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _short(digest: str) -> str:
    """Enough of a digest for people to compare."""
    return f"sha256 {digest[:12]}"

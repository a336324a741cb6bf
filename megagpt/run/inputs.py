"""What a run reads is whole: every shard is compared with its checksum before training (L3).

Every host reads what it will train on: the ranks that see the same file share it out, so that files
on a file system of all hosts are read once, and copies on each host's own disk by each host. What
was found whole is remembered by path, size, times and checksum, so that the next start reads only
what is new: RUN/verified.json has what all hosts share, RUN/verified/HOST.json what one host has.
Rank 0 keeps both; every rank looks at the files of its own share and at no others.
"""

import json
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from megagpt.config import RunConfig
from megagpt.corpus.manifest import CorpusManifest, Shard
from megagpt.corpus.verify import verify_files
from megagpt.engine import Engine
from megagpt.errors import DamageError
from megagpt.files import write_file
from megagpt.order.loader import TokenLoader
from megagpt.run.volume import volume_of

MEMORY = "verified.json"
OWN = "verified"
"""Folder of what single hosts remember."""


class Work(Protocol):
    """Work that takes some ranks longer than others, who wait for it: cluster.meeting.LongWork."""

    def alive(self) -> None:
        """This rank goes on."""

    def wait(self) -> None:
        """Returns when all ranks have come here."""


class _Place(NamedTuple):
    """A rank among those that see the same copy of a corpus."""

    number: int
    sharing: int
    everywhere: bool
    """Whether all ranks do."""


def check_data(loaders: Sequence[TokenLoader], run: Path, engine: Engine, work: Work) -> None:
    """Raises DamageError, on every rank, that names each damaged shard. All ranks call it."""
    shards = [(s.manifest, x) for load in loaders for s in load.stores for x in s.manifest.shards]
    folders = list(dict.fromkeys(manifest.folder for manifest, _ in shards))
    host, volumes = socket.gethostname(), [volume_of(folder) for folder in folders]
    seen = engine.collect((host, volumes))
    places = engine.first(_places(seen))[engine.ranks.rank]
    real = [os.path.realpath(folder) for folder in folders]
    share, states = [], []
    for number, (manifest, shard) in enumerate(shards):
        at = folders.index(manifest.folder)
        if number % places[at].sharing == places[at].number:
            share.append((manifest, shard, "" if places[at].everywhere else f" (on {host})"))
            states.append(_state(manifest, shard, volumes[at], real[at]))
    told = engine.collect(states)
    memory = _Memory(run, [name for name, _ in seen], told)
    problems = []
    for number in engine.first(memory.unknown())[engine.ranks.rank]:
        manifest, shard, where = share[number]
        found = verify_files(manifest, [shard.name], lambda _: work.alive())
        problems += [problem + where for problem in found]
    # Not by a collective, whose time is limited: one large file may take hours.
    work.wait()
    found = [problem for own in engine.collect(problems) for problem in own]
    engine.by_first(lambda: memory.judge(list(dict.fromkeys(found))))


def _places(seen: Sequence[tuple[str, Sequence[str]]]) -> list[list[_Place]]:
    """By rank and folder: of the ranks that see the same volume each reads every n-th shard.

    seen: host and volumes of the folders, of every rank.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for rank, (_, volumes) in enumerate(seen):
        for folder, volume in enumerate(volumes):
            groups.setdefault((folder, volume), []).append(rank)
    places: list[list[_Place]] = [[] for _ in seen]
    for (_, _), ranks in sorted(groups.items()):
        for number, rank in enumerate(ranks):
            places[rank].append(_Place(number, len(ranks), len(ranks) == len(seen)))
    return places


class _Memory:
    """What was found whole at earlier starts; rank 0 alone has one that is not empty."""

    def __init__(self, run: Path, hosts: Sequence[str], states: Sequence[Sequence[str]]) -> None:
        """hosts, states: of every rank, and of the shards of its share."""
        self.states = states
        self.keepers: dict[Path, set[str]] = {}
        """File -> what belongs into it."""
        for host, own in zip(hosts, states, strict=True):
            for state in own:
                local = state.startswith(f"{host} ")
                path = run / OWN / f"{host}.json" if local else run / MEMORY
                self.keepers.setdefault(path, set()).add(state)
        self.known = {path: set(_recall(path)) for path in self.keepers}

    def unknown(self) -> list[list[int]]:
        """By rank, which shards of its share have to be read."""
        known = set[str]().union(*self.known.values())
        return [[n for n, state in enumerate(own) if state not in known] for own in self.states]

    def judge(self, problems: Sequence[str]) -> None:
        """Remembers what is whole. Raises DamageError for the problems that were found."""
        if problems:
            raise DamageError(
                "damaged shards:\n" + "\n".join(f"  - {p}" for p in problems) + "\n"
                "prepare the corpus again, or restore the files from a copy"
            )
        for path, states in self.keepers.items():
            _remember(path, states, self.known[path])


def evaluation_samples(config: RunConfig, n_windows: int) -> int:
    """Sequences of an evaluation: whole increments of the batch, so that any layout carries it."""
    increment = config.schedule.increment_tokens // config.model.n_ctx
    return min(config.evaluate.batches, max(1, n_windows // increment)) * increment


def _recall(path: Path) -> list[str]:
    """What was found whole before; a memory that cannot be read only costs time."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def _remember(path: Path, states: Iterable[str], known: set[str]) -> None:
    """Writes what was found whole, where some of it is new."""
    whole = sorted(set(states) - {""})
    if not known.issuperset(whole):
        path.parent.mkdir(exist_ok=True)
        write_file(path, json.dumps(whole) + "\n")


def _state(manifest: CorpusManifest, shard: Shard, volume: str, real: str) -> str:
    """Changes whenever the files or what is expected of them change: a copy that took over the
    times of its original has another time of change, or another inode. real: the folder, without
    links."""
    files = manifest.files(shard)
    try:
        stats = [path.stat() for path, _, _ in files]
    except OSError:
        return ""
    times = [f"{f.st_size} {f.st_mtime_ns} {f.st_ctime_ns} {f.st_ino}" for f in stats]
    place = os.path.join(real, files[0][0].name)
    return " ".join([volume, place, *times, *(digest for *_, digest in files)])

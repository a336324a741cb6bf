"""What a run reads is whole: every shard is compared with its checksum before training (L3).

Every host reads what it will train on: the ranks that see the same file share it out, so that files
on a file system of all hosts are read once, and copies on each host's own disk by each host. What
was found whole is remembered by path, size, times and checksum, so that the next start reads only
what is new: RUN/verified.json has what all hosts share, RUN/verified/HOST.json what one host has.
"""

import json
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

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


def check_data(loaders: Sequence[TokenLoader], run: Path, engine: Engine, work: Work) -> None:
    """Raises DamageError, on every rank, that names each damaged shard. All ranks call it."""
    shards = [(s.manifest, x) for load in loaders for s in load.stores for x in s.manifest.shards]
    folders = dict.fromkeys(manifest.folder for manifest, _ in shards)
    host, volumes = socket.gethostname(), [volume_of(folder) for folder in folders]
    everywhere = engine.gather((host, volumes))
    volume = dict(zip(folders, volumes, strict=True))
    own = run / OWN / f"{host}.json"
    shared_memory = _recall(run / MEMORY) if engine.ranks.rank == 0 else []
    known = {*engine.first(shared_memory), *_recall(own)}
    share = _share(engine.ranks.rank, shards, list(folders), everywhere)
    states = {id(shard): _state(m, shard, volume[m.folder]) for m, shard in shards}
    problems = []
    for manifest, shard in share:
        if states[id(shard)] not in known:
            found = verify_files(manifest, [shard.name], lambda _: work.alive())
            shared = all(volume[manifest.folder] in there for _, there in everywhere)
            problems += found if shared else [f"{problem} (on {host})" for problem in found]
    # Not by a collective, whose time is limited: one large file may take hours.
    work.wait()
    if found := list(dict.fromkeys(p for problems in engine.gather(problems) for p in problems)):
        raise DamageError(
            "damaged shards:\n" + "\n".join(f"  - {p}" for p in found) + "\n"
            "prepare the corpus again, or restore the files from a copy"
        )
    hosts = [name for name, _ in everywhere]
    local = [states[id(x)] for m, x in shards if volume[m.folder].startswith(f"{host} ")]
    if engine.ranks.rank == 0:
        _remember(run / MEMORY, set(states.values()) - set(local), known)
    if engine.ranks.rank == hosts.index(host):
        _remember(own, local, known)


def _share(
    rank: int,
    shards: Sequence[tuple[CorpusManifest, Shard]],
    folders: Sequence[Path],
    everywhere: Sequence[tuple[str, Sequence[str]]],
) -> list[tuple[CorpusManifest, Shard]]:
    """The shards that this rank reads: of the ranks that see the same volume each has every n-th.

    everywhere: host and volumes of the folders, of every rank.
    """
    mine = []
    for number, (manifest, shard) in enumerate(shards):
        place = folders.index(manifest.folder)
        own = everywhere[rank][1][place]
        sharing = [r for r, (_, volumes) in enumerate(everywhere) if volumes[place] == own]
        if sharing[number % len(sharing)] == rank:
            mine.append((manifest, shard))
    return mine


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


def _state(manifest: CorpusManifest, shard: Shard, volume: str) -> str:
    """Changes whenever the files or what is expected of them change: a copy that took over the
    times of its original has another time of change, or another inode."""
    files = manifest.files(shard)
    try:
        stats = [path.stat() for path, _, _ in files]
    except OSError:
        return ""
    times = [f"{f.st_size} {f.st_mtime_ns} {f.st_ctime_ns} {f.st_ino}" for f in stats]
    place = str(files[0][0].resolve())
    return " ".join([volume, place, *times, *(digest for *_, digest in files)])

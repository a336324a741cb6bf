"""What a run reads is whole: every shard is compared with its checksum before training (L3).

The ranks share the shards out. What was found whole is remembered in RUN/verified.json by path,
size, time of change and checksum, so that the next start reads only what is new.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from megagpt.config import RunConfig
from megagpt.corpus.manifest import CorpusManifest, Shard
from megagpt.corpus.verify import verify_files
from megagpt.engine import Engine
from megagpt.errors import DamageError
from megagpt.files import write_file
from megagpt.order.loader import TokenLoader

MEMORY = "verified.json"


def check_data(
    loaders: Sequence[TokenLoader], run: Path, engine: Engine, alive: Callable[[], None]
) -> None:
    """Raises DamageError, on every rank, that names each damaged shard. All ranks call it.

    `alive` is called as the reading goes on, which may take hours.
    """
    shards = [
        (s.manifest, shard) for load in loaders for s in load.stores for shard in s.manifest.shards
    ]
    # One rank's memory serves all, so that all share out the same work.
    known = set(engine.gather(_recall(run))[0])
    unknown = [(m, s) for m, s in shards if _state(m, s) not in known]
    share = unknown[engine.ranks.rank :: engine.ranks.world]
    problems = [
        p for manifest, s in share for p in verify_files(manifest, [s.name], lambda _: alive())
    ]
    found = [problem for problems in engine.gather(problems) for problem in problems]
    if found:
        raise DamageError(
            "damaged shards:\n" + "\n".join(f"  - {p}" for p in found) + "\n"
            "prepare the corpus again, or restore the files from a copy"
        )
    if engine.ranks.rank == 0 and unknown:
        write_file(run / MEMORY, json.dumps(sorted(_state(m, s) for m, s in shards)) + "\n")


def evaluation_samples(config: RunConfig, n_windows: int) -> int:
    """Sequences of an evaluation: whole increments of the batch, so that any layout carries it."""
    increment = config.schedule.increment_tokens // config.model.n_ctx
    return min(config.evaluate.batches, max(1, n_windows // increment)) * increment


def _recall(run: Path) -> list[str]:
    """What was found whole before; a memory that cannot be read only costs time."""
    try:
        found = json.loads((run / MEMORY).read_text())
    except (OSError, ValueError):
        return []
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def _state(manifest: CorpusManifest, shard: Shard) -> str:
    """Changes whenever the files or what is expected of them change."""
    files = manifest.files(shard)
    try:
        stats = [path.stat() for path, _, _ in files]
    except OSError:
        return ""
    times = [f"{f.st_size} {f.st_mtime_ns}" for f in stats]
    return " ".join([str(files[0][0].resolve()), *times, *(digest for *_, digest in files)])

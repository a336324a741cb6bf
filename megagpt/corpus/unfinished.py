"""What an unfinished preparation remembers, in `.preparation/` of its output folder.

`plan.json` says what is being prepared, so that another corpus is refused; `state.json` how many
units lie flushed in shards; `N.bin` and `N.doc` are parts of units (part.py), `N.grams` what the
first pass saw in them (contamination.py). One process at a time holds `lock`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megagpt.corpus.documents import Source
from megagpt.corpus.manifest import MANIFEST
from megagpt.corpus.shards import Shard
from megagpt.corpus.unit import Unit
from megagpt.errors import DamageError, UsageError
from megagpt.files import write_durably

log = logging.getLogger("megagpt.data")

FOLDER = ".preparation"
LOCK_WAIT_S = 10.0


def beside(output: Path, ending: str) -> Path:
    """The folder beside `output` whose name has an ending more. Raises UsageError for `/`."""
    # `.` and `..` have no name of their own.
    output = output if output.name not in ("", "..") else output.resolve()
    if not output.name:
        raise UsageError(f"output {output}: nothing lies beside it; choose a folder with a name")
    return output.with_name(output.name + ending)


def unit_path(folder: Path, number: int, ending: str) -> Path:
    """`N.bin`, `N.doc` or `N.grams` of a unit."""
    return folder / f"{number:09d}.{ending}"


def payload_digest(payload: Any) -> str:
    """A digest of what a unit carries; empty when it carries nothing."""
    if payload is None:
        return ""
    content = payload if isinstance(payload, bytes) else repr(payload).encode("utf-8", "replace")
    return blake2b(content, digest_size=16).hexdigest()


@contextmanager
def believed(path: Path) -> Iterator[None]:
    """Around reading a file of `.preparation`. Raises DamageError when it does not read back."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(
            f"{path}: not what a preparation writes ({type(error).__name__}: {error}); remove "
            f"{path.parent.parent} to start again"
        ) from None


class State:
    """The state of one preparation; `folders` are train and validation. Opening it takes the lock.

    Raises UsageError when another process works there or another corpus is in the folders.
    """

    def __init__(self, folders: Sequence[Path], plan: dict[str, Any]) -> None:
        self.folder = folders[0] / FOLDER
        # In every folder, so that none of them is taken for a whole corpus meanwhile.
        self._marks = [folder / FOLDER for folder in folders]
        if not self.folder.is_dir():
            for folder in folders:
                _refuse_strangers(folder)
        for mark in self._marks:
            mark.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        self._wait_for_lock(folders[0])
        self._check_plan(folders[0], plan)
        self.units = 0
        """Units whose documents lie flushed in shards."""
        self.finished: list[list[Shard]] = [[] for _ in folders]
        path = self.folder / "state.json"
        if path.exists():
            with believed(path):
                data = json.loads(path.read_bytes())
                self.units = int(data["units"])
                self.finished = [[Shard(**shard) for shard in each] for each in data["finished"]]
        for stale in self.folder.glob("*.tmp"):
            stale.unlink()

    def _wait_for_lock(self, output: Path) -> None:
        """Take the lock, which workers of a killed run hold a moment longer than their parent.

        filelock would close it in them: the next run would write beside them.
        """
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"{output}: another process is preparing it; wait for it or stop it"
                    ) from None
            except OSError as error:
                log.warning(
                    "%s: its file system has no locks (%s); start no second preparation there",
                    output,
                    error.strerror,
                )
                break
            time.sleep(0.05)
        if os.fstat(self._lock.fileno()).st_nlink == 0:
            raise UsageError(
                f"{output}: another process has just finished it; run the same command again"
            )

    def _check_plan(self, output: Path, plan: dict[str, Any]) -> None:
        path = self.folder / "plan.json"
        if not path.exists():
            write_durably(path, json.dumps(plan).encode())
            return
        with believed(path):
            before = dict(json.loads(path.read_bytes()))
        now = json.loads(json.dumps(plan))
        if before != now:
            raise UsageError(
                f"{output} holds an unfinished preparation of something else "
                f"({plan_difference(before, now)}); give the same inputs and options to continue "
                "it, or remove the folder to start again"
            )

    def is_done(self, unit: Unit, ending: str = "doc") -> bool:
        """Whether a file of the unit exists already. Raises UsageError when its input differs."""
        path = unit_path(self.folder, unit.number, ending)
        if not path.exists():
            return False
        if unit.payload is not None:
            with believed(path), path.open("rb") as file:
                digest = json.loads(file.readline())["digest"]
            if digest != payload_digest(unit.payload):
                raise self.other_input()
        return True

    def other_input(self) -> UsageError:
        """The error for an input that is read again and gives something else."""
        return UsageError(
            f"{self.folder.parent}: its unfinished preparation had read other documents from this "
            "input; give the same input again, or remove the folder to start again"
        )

    def save(self, units: int, finished: list[list[Shard]]) -> None:
        """Remember that `units` lie flushed in shards, and drop their tokens."""
        data = {
            "units": units,
            "finished": [[asdict(shard) for shard in shards] for shards in finished],
        }
        write_durably(self.folder / "state.json", json.dumps(data).encode())
        for number in range(self.units, units):
            unit_path(self.folder, number, "bin").unlink(missing_ok=True)
        self.units = units

    def remove(self) -> None:
        """Everything is in shards and manifests now."""
        for mark in reversed(self._marks):
            shutil.rmtree(mark)

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        """Let another process work here."""
        self._lock.close()


def plan_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, the first thing in which two plans differ."""
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            if key in ("sources", "import"):
                return "the input files differ or have changed"
            return f"{key} was {before.get(key)!r}, now it is {now.get(key)!r}"
    return "nothing"


def source_plan(sources: Sequence[Source]) -> list[list[Any]]:
    """What identifies the sources between two runs."""
    return [[source.path, source.format, source.bytes, source.mtime_ns] for source in sources]


def _refuse_strangers(folder: Path) -> None:
    if not folder.is_dir():
        return
    names = [path.name for path in folder.iterdir()]
    strangers = [name for name in names if name == MANIFEST or name.endswith((".bin", ".idx"))]
    if strangers:
        raise UsageError(
            f"{folder} already holds another corpus ({sorted(strangers)[0]}); choose another "
            f"--output, or remove {os.fspath(folder)} first"
        )

"""Saving: every rank writes its slices while training goes on; one rename makes it count (L2).

1) `begin` asks whether the files of all ranks fit on the disk, copies the slices to host memory
   (the only stall) and starts one thread a rank.
2) The thread writes the rank's file, hashes and flushes it.
3) Once all ranks are done, `finish` gathers the records; rank 0 writes the manifest last and
   renames the folder.
A crash at any instant leaves the checkpoints before it as they were. A rank that cannot write
says so in the gathering, and all ranks agree that there is no checkpoint.
"""

import dataclasses
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megagpt.checkpoint import record as manifests
from megagpt.checkpoint.record import Manifest
from megagpt.checkpoint.slice_file import FileRecord, write_slices
from megagpt.config import RunConfig, dump_run
from megagpt.engine.engine import Engine
from megagpt.engine.slices import STATES, Slice
from megagpt.errors import DamageError
from megagpt.files import sync_folder

log = logging.getLogger(__name__)


class Saver:
    """Saves one run's checkpoints. All ranks make one and call its methods together."""

    def __init__(self, run: Path, config: RunConfig, engine: Engine) -> None:
        self.run = run
        self.config = config
        self.engine = engine
        self._writing: threading.Thread | None = None
        self._state: Manifest | None = None
        self._result: FileRecord | str = ""
        """What this rank wrote, or what kept it from it."""
        self.stall_s = 0.0
        """Seconds that the last checkpoint kept training waiting."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was begun and not yet finished: the same on every rank."""
        return self._state is not None

    @property
    def ready(self) -> bool:
        """Whether this rank's part of it is written."""
        return self._writing is None or not self._writing.is_alive()

    def begin(self, state: Manifest) -> None:
        """Starts to save `state` (its files are filled in later), finishing the one before."""
        self.finish()
        t0 = time.perf_counter()
        temporary = self._folder(state).with_suffix(manifests.TEMPORARY)
        owned = [one for one in self.engine.slices() if one.owned]
        own_bytes = 4 * len(STATES) * sum(one.numel for one in owned)
        needed = int(self.engine.total([own_bytes])[0])
        # The gathering is a barrier too: no rank writes before the folder is there.
        self._state = state
        self._result = self._on_rank_0(lambda: _make_anew(temporary, needed))
        if not self._result:
            held = [_copied(one) for one in owned]
            path = temporary / f"rank_{self.engine.ranks.rank:05d}.safetensors"
            self._writing = threading.Thread(target=self._write, args=(path, held), daemon=True)
            self._writing.start()
            if not self.config.checkpoint.background:
                self._writing.join()
        self.stall_s = time.perf_counter() - t0

    def _write(self, path: Path, held: list[Slice]) -> None:
        try:
            self._result = write_slices(path, held)
        except OSError as error:
            self._result = f"{path}: {error.strerror or error}"
        except Exception as error:
            # The other ranks wait for this one's result, whatever went wrong here.
            self._result = f"{path}: {type(error).__name__}: {error}"

    def finish(self, last: bool = False) -> Path | None:
        """Waits for all ranks' files and makes the checkpoint valid; returns its folder.

        None when nothing was begun, or when it failed and checkpoint.on_failure = "continue".
        Raises DamageError when it failed and on_failure = "stop", or when it is the `last` one of
        this process: then there is no training left that could go on.
        """
        if self._state is None:
            return None
        t0 = time.perf_counter()
        if self._writing is not None:
            self._writing.join()
        state, self._state, self._writing = self._state, None, None
        results = self.engine.gather(self._result)
        problems = list(dict.fromkeys(r for r in results if isinstance(r, str)))
        folder = self._folder(state)
        if not problems:
            committed = self._on_rank_0(lambda: self._commit(folder, state, results))
            problems = [committed] if committed else []
        if problems:
            temporary = folder.with_suffix(manifests.TEMPORARY)
            self._on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True))
            self._fail(problems, last)
            return None
        self.stall_s += time.perf_counter() - t0
        return folder

    def _folder(self, state: Manifest) -> Path:
        return manifests.folder_of(self.run) / manifests.name_of(state.step)

    def _on_rank_0(self, action: Callable[[], None]) -> str:
        """Runs `action` on rank 0; what kept it from working, "" when it worked, on every rank."""
        problem = ""
        if self.engine.ranks.rank == 0:
            try:
                action()
            except (OSError, DamageError) as error:
                problem = _reason(error, self.run)
        return str(self.engine.gather(problem)[0])

    def _commit(self, folder: Path, state: Manifest, records: list[FileRecord]) -> None:
        temporary = folder.with_suffix(manifests.TEMPORARY)
        manifests.write_file(temporary / "config.toml", dump_run(self.config))
        files = (*records, manifests.record_of(temporary / "config.toml"))
        manifests.write_manifest(temporary, dataclasses.replace(state, files=files))
        sync_folder(temporary)
        if folder.exists():
            # Saved before at this step, by a run that was then sent back to an older checkpoint.
            manifests.set_aside(folder)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
        # From here on it is valid, so nothing below may call it not saved.
        try:
            manifests.retire(self.run, self.config.checkpoint.keep_last)
            manifests.write_file(folder.parent / "latest", folder.name + "\n")
        except OSError as error:
            log.warning("%s is saved, but %s", folder, _reason(error, folder.parent))

    def _fail(self, problems: list[str], last: bool) -> None:
        text = "checkpoint not saved: " + "; ".join(problems)
        if self.config.checkpoint.on_failure == "continue" and not last:
            if self.engine.ranks.rank == 0:
                log.error("%s; the checkpoints before it are whole; training goes on", text)
            return
        raise DamageError(
            f"{text}; the checkpoints before it are whole; make space and run again to go on"
        )


def _copied(one: Slice) -> Slice:
    """The slice with its elements copied to host memory, so that training may change them."""
    copies = {key: one.read(key).detach().to("cpu", torch.float32, copy=True) for key in STATES}
    return dataclasses.replace(one, read=copies.__getitem__)


def _make_anew(folder: Path, needed: int) -> None:
    """An empty folder, whatever was there. Raises OSError, also where `needed` bytes do not fit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed:,} bytes are needed and {free:,} are free")


def _reason(error: OSError | DamageError, place: Path) -> str:
    if isinstance(error, DamageError):
        return str(error)
    return f"{error.filename or place}: {error.strerror or error}"

"""Saving: every rank writes its slices while training goes on; one rename makes it count (L2).

1) `begin` asks whether the files of all ranks fit on the disk, copies the slices to host memory
   (the only stall) and starts one thread a rank.
2) The thread writes the rank's file, hashes and flushes it.
3) Once all ranks are done, `finish` brings the records to rank 0, which writes the manifest last
   and renames the folder. A thread of its removes older checkpoints (`record.retire`), while
   training goes on.
A crash at any instant leaves the checkpoints before it as they were. A rank that cannot write
says so in the gathering, and all ranks agree that there is no checkpoint.
"""

import dataclasses
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint import record
from megagpt.checkpoint.record import CheckpointRecord, FileRecord
from megagpt.checkpoint.slice_file import file_name, write_slices
from megagpt.checkpoint.slice_index import index_of_packed, packed
from megagpt.config import RunConfig, dump_run
from megagpt.engine.engine import Engine
from megagpt.engine.slices import STATES, Slice
from megagpt.errors import DamageError, UsageError
from megagpt.files import write_durably, write_file
from megagpt.tokenizer.portable import FILE

log = logging.getLogger(__name__)


class Saver:
    """Saves one run's checkpoints. All ranks make one and call its methods together."""

    def __init__(
        self, run: Path, config: RunConfig, engine: Engine, vocabulary: bytes = b""
    ) -> None:
        """vocabulary: the tokenizer.json that goes into every checkpoint; b"": none is known."""
        self.run = run
        self.vocabulary = vocabulary
        self.config = config
        self.engine = engine
        cuda = engine.device.type == "cuda"
        self._copied = HostBuffer(pinned=True).copied if cuda else copied_apart
        self._saving: CheckpointRecord | None = None
        """The checkpoint that was begun and is not finished."""
        self._thread: threading.Thread | None = None
        self._result: FileRecord | str = ""
        """What this rank wrote, or what kept it from it."""
        self._held = b""
        """What of the parameters is in it."""
        self._removal: threading.Thread | None = None
        self.stall_s = 0.0
        """Seconds that the last checkpoint kept training waiting."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was begun and not yet finished: the same on every rank."""
        return self._saving is not None

    @property
    def ready(self) -> bool:
        """Whether this rank's part of it is written."""
        return self._thread is None or not self._thread.is_alive()

    def begin(self, state: CheckpointRecord) -> None:
        """Starts to save `state` (its files are filled in later), finishing the one before."""
        self.finish()
        t0 = time.perf_counter()
        temporary = record.unfinished_of(self._folder(state))
        owned = [piece for piece in self.engine.slices() if piece.owned]
        rank_bytes = 4 * len(STATES) * sum(piece.numel for piece in owned)
        needed = int(self.engine.total([rank_bytes])[0])
        self._saving = state
        self._held = packed(owned)
        # No rank goes on, and writes, before the folder is there.
        self._result = self._on_rank_0(lambda: self._make_anew(temporary, needed))
        if not self._result:
            copies = self._copied(owned)
            path = temporary / file_name(self.engine.ranks.rank)
            self._thread = threading.Thread(target=self._write, args=(path, copies), daemon=True)
            self._thread.start()
            if not self.config.checkpoint.background:
                self._thread.join()
        self.stall_s = time.perf_counter() - t0

    def _write(self, path: Path, copies: list[Slice]) -> None:
        try:
            self._result = write_slices(path, copies)
        except OSError as error:
            self._result = _reason(error, path)
        except Exception as error:
            # The other ranks wait for this one's result, whatever went wrong here.
            self._result = f"{path}: {type(error).__name__}: {error}"

    def finish(self, last: bool = False) -> Path | None:
        """Waits for all ranks' files and makes the checkpoint valid; returns its folder.

        None when nothing was begun, or when it failed and checkpoint.on_failure = "continue".
        Raises DamageError when it failed and on_failure = "stop", or when it is the `last` one of
        this process: then there is no training left that could go on.
        """
        if self._saving is None:
            return None
        t0 = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
        state, self._saving, self._thread = self._saving, None, None
        results = self.engine.collect((self._result, self._held))
        folder = self._folder(state)
        if problem := self._on_rank_0(lambda: self._commit(folder, state, results)):
            self._fail(problem, last)
            return None
        self.stall_s += time.perf_counter() - t0
        return folder

    def _folder(self, state: CheckpointRecord) -> Path:
        return record.folder_of(self.run) / record.name_of(state.step)

    def _on_rank_0(self, action: Callable[[], None]) -> str:
        """Runs `action` on rank 0; what kept it from working, "" when it worked, on every rank."""
        try:
            self.engine.by_first(action)
        except (OSError, DamageError) as error:
            return _reason(error, self.run)
        return ""

    def _commit(
        self, folder: Path, state: CheckpointRecord, results: list[tuple[FileRecord | str, bytes]]
    ) -> None:
        """Makes the checkpoint valid. Raises OSError or DamageError, with nothing left of it."""
        temporary = record.unfinished_of(folder)
        try:
            if problems := list(dict.fromkeys(r for r, _ in results if isinstance(r, str))):
                raise DamageError("; ".join(problems))
            files = [r for r, _ in results if not isinstance(r, str)]
            self._seal(folder, state, files, index_of_packed([held for _, held in results]))
        except (OSError, DamageError):
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _seal(
        self, folder: Path, state: CheckpointRecord, files: list[FileRecord], index: str
    ) -> None:
        temporary = record.unfinished_of(folder)
        write_file(temporary / record.INDEX, index)
        write_file(temporary / record.CONFIG, dump_run(self.config))
        if self.vocabulary:
            write_durably(temporary / FILE, self.vocabulary)
        record.seal(temporary, state, files)
        advances = self._advances(state)
        if os.path.lexists(folder):
            # Saved before at this step, by a run that was then sent back to an older checkpoint.
            record.set_aside(folder)
        record.publish(temporary, folder)
        # From here on it is valid, so nothing below may call it not saved.
        try:
            record.name_latest(folder)
        except OSError as error:
            log.warning("%s is saved, but %s", folder, _reason(error, folder.parent))
        if advances:
            self._removal = threading.Thread(
                target=self._retire, args=(self._removal,), daemon=True
            )
            self._removal.start()

    def _retire(self, before: threading.Thread | None) -> None:
        """Removes what is no longer kept, once the removal `before` is over. Thousands of files of
        terabytes take minutes on some file systems; what is left half-done at a stop or a crash the
        next start removes."""
        if before is not None:
            before.join()
        try:
            record.retire(self.run, self.config.checkpoint.keep_last)
        except OSError as error:
            log.warning("older checkpoints stay: %s", _reason(error, self.run))

    def settle(self) -> None:
        """Returns once older checkpoints are gone that are being removed."""
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def _make_anew(self, folder: Path, needed: int) -> None:
        """An empty folder, whatever was there. Raises OSError, also where `needed` bytes do not
        fit."""
        if os.path.lexists(folder):
            self.settle()  # it may be what is being removed
        record.remove(folder)
        folder.mkdir(parents=True)
        if shutil.disk_usage(folder).free < needed:
            self.settle()
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"{needed:,} bytes are needed and {free:,} are free")

    def _advances(self, state: CheckpointRecord) -> bool:
        """Whether an update was made since the newest checkpoint. A run that makes none any more
        must not push out what it could go back to."""
        newest = record.list_checkpoints(self.run)[-1:]
        try:
            return all(record.read_record(folder).updates < state.updates for folder in newest)
        except (DamageError, UsageError):
            return True

    def _fail(self, problem: str, last: bool) -> None:
        text = f"checkpoint not saved: {problem}"
        if self.config.checkpoint.on_failure == "continue" and not last:
            if self.engine.ranks.rank == 0:
                log.error("%s; the checkpoints before it are whole; training goes on", text)
            return
        raise DamageError(
            f"{text}; the checkpoints before it are whole; make space and run again to go on"
        )


def _reason(error: OSError | DamageError, path: Path) -> str:
    if isinstance(error, DamageError):
        return str(error)
    return f"{error.filename or path}: {error.strerror or error}"


# --- copies that training does not change -------------------------------------------------------


def copied_apart(slices: Sequence[Slice]) -> list[Slice]:
    """The slices with their elements in host memory that is free once they are written."""
    copies = []
    for piece in slices:
        values = {k: piece.read(k).detach().to("cpu", torch.float32, copy=True) for k in STATES}
        copies.append(dataclasses.replace(piece, read=values.__getitem__))
    return copies


class HostBuffer:
    """Host memory for a rank's slices, kept between saves.

    A GPU copies into pinned memory by itself: all copies are queued at once and waited for
    together, where pageable memory takes a detour and a wait for each of them. Pinning takes
    longer than copying, so it is done once.
    """

    def __init__(self, pinned: bool, block: int = 1 << 28) -> None:
        self.pinned = pinned
        self.block = block
        """Elements of a block of memory, a power of two, as torch rounds pinned memory up."""
        self._blocks: list[Tensor] = []

    def copied(self, slices: Sequence[Slice]) -> list[Slice]:
        """The slices with their elements in the buffer; those of the call before are overwritten.

        They are there when this returns: training may change the tensors that they come from.
        """
        numel = len(STATES) * sum(piece.numel for piece in slices)
        if numel > sum(len(block) for block in self._blocks):
            # Freed first, or both would be there at once.
            self._blocks = []
            sizes = [min(self.block, numel - start) for start in range(0, numel, self.block)]
            self._blocks = [self._allocated(size) for size in sizes]
        copies, start = [], 0
        for piece in slices:
            stretches = {}
            for key in STATES:
                stretches[key] = self._stretch(start, start + piece.numel)
                sources = piece.read(key).detach().split([len(s) for s in stretches[key]])
                for stretch, source in zip(stretches[key], sources, strict=True):
                    stretch.copy_(source, non_blocking=True)
                start += piece.numel
            copies.append(dataclasses.replace(piece, read=partial(_joined, stretches)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _stretch(self, start: int, end: int) -> list[Tensor]:
        """Elements [start, end) of the buffer, one tensor for each block that has some of them."""
        return [
            self._blocks[number][max(0, start - number * self.block) : end - number * self.block]
            for number in range(start // self.block, -(-end // self.block))
        ]

    def _allocated(self, numel: int) -> Tensor:
        try:
            return torch.empty(numel, dtype=torch.float32, pin_memory=self.pinned)
        except RuntimeError as error:
            log.warning("checkpoints take longer: no pinned memory (%s)", str(error).split("\n")[0])
            return torch.empty(numel, dtype=torch.float32)


def _joined(stretches: Mapping[str, list[Tensor]], key: str) -> Tensor:
    """A slice's elements, copied once more only where they lie in two blocks."""
    return stretches[key][0] if len(stretches[key]) == 1 else torch.cat(stretches[key])

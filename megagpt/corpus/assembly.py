"""Parts into shards, in the order of the input; and the digests of what was read.

The parent process does this while its workers encode. All that is decided here (which documents
are duplicates, which shard takes a document) follows from the parts in order, so a run that goes
on after a kill decides the same again from the `.doc` files alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.corpus.clean import Seen, Similar
from megagpt.corpus.part import SHOWN, Part, part_path
from megagpt.corpus.shards import BLOCK
from megagpt.corpus.source import Source, Unit
from megagpt.corpus.state import State
from megagpt.corpus.summary import Summary
from megagpt.corpus.writer import ShardWriter
from megagpt.errors import DamageError, UsageError
from megagpt.files import file_sha256

LISTED = 10_000
"""Sources that a manifest lists one by one; more become one entry."""
FLUSH_UNITS = 32
"""Units between two flushes: what a killed run may have to assemble again."""

log = logging.getLogger("megagpt.data")


class Assembly:
    """Takes units in order and writes their documents; `summary` grows with them."""

    def __init__(
        self,
        state: State,
        writers: Sequence[ShardWriter],
        sources: Sequence[Source],
        *,
        duplicates: Seen | None = None,
        similar: Similar | None = None,
        strict: bool = False,
    ) -> None:
        self.summary = Summary(folders=tuple(writer.folder for writer in writers))
        self._state, self._writers, self._sources = state, writers, sources
        self._duplicates, self._similar, self._strict = duplicates, similar, strict
        self._first_item: Counter[int] = Counter()
        self._resumed = state.units
        self._shown: Counter[str] = Counter()

    def take(self, unit: Unit) -> Part:
        """Add the documents of a unit whose part is done."""
        part = self._state.part(unit.number)
        for item, reason, detail, path in part.problems:
            self.report(reason, path or self._place(unit, item), detail)
        self.summary.left_out.update(part.counts)
        self.summary.notes.update(part.notes)
        keep = self._keep(part)
        self._write(unit, part, keep)
        self._note_longest(unit, part, keep)
        if len(unit.sources) == 1:
            self._first_item[unit.sources[0]] += part.n_items
        if unit.number + 1 - self._state.units >= FLUSH_UNITS:
            self.flush(unit.number + 1)
        return part

    def flush(self, units: int) -> None:
        """Put all shards on the disk and remember how far they are."""
        for writer in self._writers:
            writer.flush()
        self._state.save(units, [writer.shards for writer in self._writers])

    def report(self, reason: str, place: str, detail: str) -> None:
        """Say once what was left out, or stop when strict. Raises DamageError."""
        text = f"{place}: {reason}" + (f" ({detail})" if detail else "")
        if self._strict:
            raise DamageError(f"{text}; repair the input, or run without --strict to leave it out")
        self._shown[reason] += 1
        if self._shown[reason] <= SHOWN:
            log.warning("%s; left out", text)
        elif self._shown[reason] == SHOWN + 1:
            log.warning("further cases of %r are only counted", reason)

    def _place(self, unit: Unit, item: int) -> str:
        """file:line of an item, or the file that it is."""
        if unit.kind == "files":
            return unit.paths[item]
        source = self._sources[unit.sources[0]]
        number = self._first_item[unit.sources[0]] + item + 1
        if source.format == "jsonl":
            name = "standard input" if source.path == "-" else source.path
            return f"{name}:{number}"
        return f"{source.path}: document {number}"

    def _keep(self, part: Part) -> npt.NDArray[np.bool_]:
        keep = np.ones(len(part.sizes), bool)
        if self._duplicates is not None:
            keep = self._duplicates.first(part.hashes)
            self._count("duplicate", int(np.count_nonzero(~keep)))
        if self._similar is not None:
            stay = self._similar.first(part.signatures[keep])
            self._count("near-duplicate", int(np.count_nonzero(~stay)))
            keep[np.flatnonzero(keep)[~stay]] = False
        return keep

    def _count(self, reason: str, count: int) -> None:
        if count:
            self.summary.left_out[reason] += count

    def _write(self, unit: Unit, part: Part, keep: npt.NDArray[np.bool_]) -> None:
        tokens = None
        for place, writer in enumerate(self._writers):
            chosen = keep & (part.validation == place)
            sizes = part.sizes[chosen]
            if not len(sizes):
                continue
            self.summary.documents[place] += len(sizes)
            self.summary.tokens[place] += int(sizes.sum())
            self.summary.text_bytes[place] += int(part.bytes[chosen].sum())
            if unit.number < self._resumed:
                writer.skip(sizes)
                continue
            if tokens is None:
                tokens = self._tokens(unit, part, writer)
            if chosen.all():
                writer.add(tokens, sizes)
            else:
                writer.add(tokens[np.repeat(chosen, part.sizes)], sizes)

    def _tokens(self, unit: Unit, part: Part, writer: ShardWriter) -> npt.NDArray:
        path = part_path(self._state.folder, unit.number, "bin")
        tokens: npt.NDArray
        try:
            tokens = np.memmap(path, dtype=writer.dtype, mode="r")
        except (OSError, ValueError):
            tokens = np.zeros(0, writer.dtype)
        if len(tokens) != int(part.sizes.sum()):
            raise DamageError(
                f"{path}: {len(tokens)} tokens, its .doc says {int(part.sizes.sum())}; remove "
                f"{writer.folder} and start again"
            )
        return tokens

    def _note_longest(self, unit: Unit, part: Part, keep: npt.NDArray[np.bool_]) -> None:
        sizes = np.where(keep, part.sizes, 0)
        if len(sizes) and int(sizes.max()) > self.summary.longest_tokens:
            place = int(np.argmax(sizes))
            self.summary.longest_tokens = int(sizes[place])
            self.summary.longest_place = self._place(unit, int(part.items[place]))


class Digests:
    """sha256 and size of every source, made in a thread beside the work."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._thread = ThreadPoolExecutor(1)
        self._whole: dict[int, Future[str]] = {}
        self._running: dict[int, Any] = {}
        self._sizes: Counter[int] = Counter()
        self._last: Future[None] | None = None

    def take(self, unit: Unit) -> None:
        """Hash what the unit reads; units come in order."""
        place = unit.sources[0]
        if unit.kind == "range":
            digest = self._running.setdefault(place, hashlib.sha256())
            path, start, end = unit.paths[0], unit.start, unit.end
            self._last = self._thread.submit(_hash_range, digest, path, start, end)
        elif self._sources[place].path == "-" or self._sources[place].documents:
            digest = self._running.setdefault(place, hashlib.sha256())
            for content in _contents(unit.payload):
                digest.update(content)
                self._sizes[place] += len(content)
        elif unit.last:
            for place in unit.sources:
                whole = Path(self._sources[place].path)
                self._whole[place] = self._thread.submit(_file_digest, whole)

    def entries(self) -> list[dict[str, Any]]:
        """The `sources` of the manifest. Raises UsageError when a file changed meanwhile."""
        self._thread.shutdown(wait=True)
        if self._last is not None:
            self._last.result()
        entries = []
        for place, source in enumerate(self._sources):
            _check_unchanged(source)
            if place in self._whole:
                digest = self._whole[place].result()
            else:
                digest = self._running.get(place, hashlib.sha256()).hexdigest()
            size = source.bytes or self._sizes[place]
            entries.append({"path": source.path, "bytes": size, "sha256": digest})
        return collapsed(entries)

    def close(self) -> None:
        """Stop hashing."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def collapsed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries, or one for all when there are too many to list."""
    if len(entries) <= LISTED:
        return entries
    listing = "".join(f"{entry['sha256']}  {entry['path']}\n" for entry in entries)
    return [
        {
            "path": os.path.commonpath([entry["path"] for entry in entries]),
            "files": len(entries),
            "bytes": sum(entry["bytes"] for entry in entries),
            "sha256": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
        }
    ]


def _contents(payload: Any) -> list[bytes]:
    if isinstance(payload, bytes):
        return [payload]
    return [
        item if isinstance(item, bytes) else str(item).encode("utf-8", "replace") + b"\0"
        for item in payload
    ]


def _file_digest(path: Path) -> str:
    """sha256, or nothing for a file that cannot be read: its unit reports it."""
    try:
        return file_sha256(path)
    except OSError:
        return ""


def _hash_range(digest: Any, path: str, start: int, end: int) -> None:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end and (block := file.read(min(BLOCK, end - start))):
            digest.update(block)
            start += len(block)


def _check_unchanged(source: Source) -> None:
    if source.documents or source.path == "-":
        return
    try:
        stat = os.stat(source.path)
        same = (stat.st_size, stat.st_mtime_ns) == (source.bytes, source.mtime_ns)
    except OSError:
        same = False
    if not same:
        raise UsageError(
            f"{source.path} changed while it was read; remove the output folder and start again"
        )

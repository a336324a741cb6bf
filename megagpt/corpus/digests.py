"""The sources as a manifest lists them: path, size and sha256 of what was read."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megagpt.corpus.documents import Source
from megagpt.corpus.manifest import MANIFEST, CorpusManifest
from megagpt.corpus.unit import Unit
from megagpt.corpus.workers import STOPS
from megagpt.errors import UsageError
from megagpt.files import BLOCK, file_sha256

LISTED = 10_000
"""Sources that a manifest lists one by one; more become one entry."""


class Digests:
    """sha256 and size of every source, made in a thread beside the work; a context manager."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        # Signals are for the main thread, which may have to wake up for them.
        self._thread = ThreadPoolExecutor(
            1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, STOPS)
        )
        self._digests = [hashlib.sha256() for _ in sources]
        self._sizes = [0] * len(sources)
        """Bytes of each that are hashed, or will be."""
        self._unreadable: set[int] = set()
        self._last: Future[None] | None = None

    def take(self, unit: Unit) -> None:
        """Hash what the unit reads; units come in order."""
        for index in unit.sources:
            source, start = self._sources[index], self._sizes[index]
            if not source.is_file:
                for content in _contents(unit.payload):
                    self._digests[index].update(content)
                    self._sizes[index] += len(content)
            else:
                end = source.bytes if unit.last else start + unit.size
                self._last = self._thread.submit(self._hash, index, start, end)
                self._sizes[index] = end

    def _hash(self, index: int, start: int, end: int) -> None:
        try:
            with open(self._sources[index].path, "rb", buffering=0) as file:
                file.seek(start)
                while start < end and (block := file.read(min(BLOCK, end - start))):
                    self._digests[index].update(block)
                    start += len(block)
        except OSError:  # the worker that reads it says so
            self._unreadable.add(index)

    def entries(self) -> list[dict[str, Any]]:
        """The `sources` of the manifest. Raises UsageError when a file changed meanwhile."""
        self._thread.shutdown(wait=True)
        if self._last is not None:
            self._last.result()
        entries = []
        for index, source in enumerate(self._sources):
            _check_unchanged(source)
            digest = "" if index in self._unreadable else self._digests[index].hexdigest()
            size = source.bytes or self._sizes[index]
            entries.append({"path": source.path, "bytes": size, "sha256": digest})
        return _collapsed(entries)

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


def made_of(manifest: CorpusManifest, sources: Sequence[Source]) -> bool:
    """Whether a corpus was made of these sources: path and size of each, and the content of those
    that are newer than the manifest."""
    written = (manifest.folder / MANIFEST).stat().st_mtime_ns
    known = {entry["path"]: entry["sha256"] for entry in manifest.sources}
    entries = []
    for source in sources:
        digest = known.get(source.path, "")
        if (source.mtime_ns > written or not digest) and source.mtime_ns:
            digest = _file_digest(Path(source.path))
        entries.append({"path": source.path, "bytes": source.bytes, "sha256": digest})
    entries = _collapsed(entries)
    for entry, before in zip(entries, manifest.sources, strict=False):
        # The size of standard input and of iterators is not known before reading.
        entry["bytes"] = entry["bytes"] or before["bytes"]
    return entries == list(manifest.sources)


def _collapsed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def _check_unchanged(source: Source) -> None:
    if not source.is_file:
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

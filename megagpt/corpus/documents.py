"""Inputs of a preparation: which files, in which format, cut into which units of work.

Units depend on the inputs alone, never on the number of workers; unit by unit in order they hold
all documents in order. A unit is about 8 MB: a byte range of JSON lines (the worker finds the
line ends), some text files, a row group of Parquet, or a block that had to be read in sequence
(compressed lines, standard input, an iterator of documents) and travels to the worker.
"""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from megagpt.corpus.array import array_elements
from megagpt.corpus.open import (
    BOM,
    COMPRESSIONS,
    TRUNCATED,
    opened,
    other_encoding,
    why_unreadable,
)
from megagpt.errors import UsageError

UNIT_BYTES = 8 << 20
FORMATS = ("text", "jsonl", "json", "parquet")
SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
"""Workers have another standard input, so that its names must not pass for files."""
OURS = ("manifest.json", "tokenizer.json")
"""Files beside shards: an output folder may lie inside the input."""


@dataclass(frozen=True)
class Documents:
    """Documents from Python: `texts()` starts from the first one each time it is called."""

    name: str
    texts: Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Source:
    """One input file, standard input (path `-`) or an iterator of documents."""

    path: str
    format: str
    compression: str = ""
    bytes: int = 0
    """On the disk; 0 when it is not known before reading."""
    mtime_ns: int = 0
    documents: Documents | None = None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work. `kind` decides which of the other fields mean something."""

    number: int = 0
    kind: str
    """range | files | rows | block | texts"""
    sources: tuple[int, ...]
    """Indices into the list of sources; one unless `files`."""
    files: tuple[tuple[str, str], ...] = ()
    """range, rows, files: path and compression of each source."""
    start: int = 0
    """range: first byte; rows: the row group."""
    end: int = 0
    """range: byte after the last."""
    size: int = 0
    """Bytes of its sources that it stands for; 0 where that is not known."""
    last: bool = True
    """Whether its sources end with it."""
    payload: Any = None
    """block: bytes of whole lines; texts: a list."""
    problem: tuple[str, str] | None = None
    """(reason, detail) of what went wrong after the payload, where reading had to stop."""


@dataclass
class Inputs:
    """What `find_sources` found."""

    sources: list[Source] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    """(path, reason, detail) of what was passed over: files and folders that were given more than
    once, of which the first counts, that cannot be read, or that are no files."""
    others: int = 0
    """Files of folders with endings that are not known."""
    seen: set[tuple[int, int]] = field(default_factory=set)
    """Device and number of each file and folder so far."""

    def pass_over(self, path: str, reason: str, detail: str = "") -> None:
        """Name what is not read."""
        self.problems.append((path, reason, detail))

    def is_new(self, path: str, status: os.stat_result) -> bool:
        """Whether the file or folder comes for the first time; names it when it does not."""
        key = (status.st_dev, status.st_ino)
        if key in self.seen:
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "file"
            self.pass_over(path, f"{kind} given more than once")
        new = key not in self.seen
        self.seen.add(key)
        return new


class Damaged(Exception):
    """(reason, detail): reading a source had to stop; what came before is good."""


# --- which files --------------------------------------------------------------------------------


def find_sources(inputs: Iterable[str | Path | Documents], format: str | None = None) -> Inputs:
    """Expand files, folders, globs, `-` and `Documents` into sources, in the order given; the
    files of a folder or glob are sorted by path, links are followed. `format` is used for every
    file.

    Raises UsageError for an input that does not exist, is a pipe or has an ending that means no
    format.
    """
    found = Inputs()
    for item in inputs:
        if isinstance(item, Documents):
            found.sources.append(Source(item.name, "documents", documents=item))
        elif str(item) in STANDARD_INPUT:
            if any(source.path == "-" for source in found.sources):
                found.pass_over("standard input", "file given more than once")
            else:
                found.sources.append(Source("-", format or "jsonl"))
        elif os.path.lexists(item) and not os.path.isdir(item):
            _add_file(found, str(item), format, named=True)
        else:
            for path in _expand(found, str(item)):
                _add_file(found, path, format, named=False)
    return found


def _expand(found: Inputs, item: str) -> list[str]:
    """The files that a folder or glob means. Raises UsageError when there is none."""
    if os.path.isdir(item):
        return _files_below(found, item)
    matches = glob.glob(_without_brackets(item), recursive=True)
    paths = {path for path in matches if not os.path.isdir(path)}
    # `**` gives the files of the folders that it matches itself.
    if "**" not in item:
        paths.update(
            p for folder in sorted(set(matches) - paths) for p in _files_below(found, folder)
        )
    if not paths:
        raise UsageError(f"input {item}: no such file or folder, and no file matches it")
    return sorted(paths)


def _without_brackets(item: str) -> str:
    """The glob with what stands in it literally, as the folder `runs[1]` in `runs[1]/*.txt`,
    escaped."""
    folder, pattern = os.path.split(item)
    while folder not in ("", os.sep) and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        pattern = os.path.join(name, pattern)
    return os.path.join(glob.escape(folder), pattern)


def _add_file(found: Inputs, path: str, format: str | None, named: bool) -> None:
    """Add one file; what is none is refused where it was named, and counted where it was found."""
    try:
        status = os.stat(path)
    except OSError as error:
        found.pass_over(path, "unreadable file", error.strerror or str(error))
        return
    problem = "" if stat.S_ISREG(status.st_mode) else "a pipe, socket or device, which is no file"
    if problem and named:
        raise UsageError(
            f"input {path}: {problem}; send its content to standard input and give - as the input"
        )
    kind, compression = _format(path, format)
    if not kind and named:
        raise UsageError(
            f"input {path}: its ending is none of {', '.join(SUFFIXES)} (or these with "
            f"{', '.join(COMPRESSIONS)}); say what it holds with --format"
        )
    if not kind:
        found.others += 1
    elif problem:
        found.pass_over(path, "no regular file", problem)
    elif found.is_new(path, status):
        size, time_ns = status.st_size, status.st_mtime_ns
        found.sources.append(Source(path, kind, compression, size, time_ns))


def _files_below(found: Inputs, folder: str) -> list[str]:
    """What is no folder below a folder, sorted by path; hidden names and what we write beside
    shards are left out. Folders that cannot be read are named."""

    def failed(error: OSError) -> None:
        found.pass_over(error.filename, "unreadable folder", error.strerror or "")

    paths: list[str] = []
    if not _enters(found, folder):
        return paths
    for root, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in shown if _enters(found, os.path.join(root, name))]
        ours = OURS if any(name.endswith(".idx") for name in files) else ()
        paths += [
            os.path.join(root, name)
            for name in files
            if not name.startswith(".") and name not in ours
        ]
    return sorted(paths)


def _enters(found: Inputs, folder: str) -> bool:
    """Whether a folder is read: each is once, since a link may lead back above itself."""
    try:
        return found.is_new(folder, os.stat(folder))
    except OSError as error:
        found.pass_over(folder, "unreadable folder", error.strerror or "")
        return False


def _format(path: str, format: str | None) -> tuple[str, str]:
    """(format, compression) by the endings; format is empty when unknown."""
    stem, ending = os.path.splitext(path)
    compression = COMPRESSIONS.get(ending.lower(), "")
    if compression:
        ending = os.path.splitext(stem)[1]
    kind = format or SUFFIXES.get(ending.lower(), "")
    if kind == "parquet":
        compression = ""
    if kind == "json" and not format and _first_byte(path, compression) != b"[":
        kind = "jsonl"  # lines of JSON in a file called .json are common
    return kind, compression


def _first_byte(path: str, compression: str) -> bytes:
    try:
        with opened(path, compression) as (file, _):
            return bytes(file.read(4096).removeprefix(BOM).lstrip()[:1])
    except TRUNCATED:
        return b""


# --- which units --------------------------------------------------------------------------------


def plan_units(sources: Sequence[Source], unit_bytes: int = UNIT_BYTES) -> Iterator[Unit]:
    """The units of all sources in order. Sequential sources are read while iterating."""
    for number, unit in enumerate(_units(sources, unit_bytes)):
        yield replace(unit, number=number)


def _units(sources: Sequence[Source], unit_bytes: int) -> Iterator[Unit]:
    texts: list[int] = []
    size = 0
    for index, source in enumerate(sources):
        is_text_file = source.format == "text" and source.path != "-"
        if texts and (not is_text_file or size + source.bytes > unit_bytes):
            yield _files_unit(sources, texts, size)
            texts, size = [], 0
        if is_text_file:
            texts.append(index)
            size += source.bytes
        else:
            yield from _source_units(source, index, unit_bytes)
    if texts:
        yield _files_unit(sources, texts, size)


def _files_unit(sources: Sequence[Source], indices: Sequence[int], size: int) -> Unit:
    files = tuple((sources[index].path, sources[index].compression) for index in indices)
    return Unit(kind="files", sources=tuple(indices), files=files, size=size)


def _source_units(source: Source, index: int, unit_bytes: int) -> Iterator[Unit]:
    if source.documents is not None:
        texts = ((text, 0) for text in source.documents.texts())
        yield from _text_units(texts, source, index, unit_bytes)
    elif (problem := _other_encoding(source)) is not None:
        yield Unit(kind="texts", sources=(index,), payload=[], size=source.bytes, problem=problem)
    elif source.format == "json":
        yield from _text_units(_elements(source), source, index, unit_bytes)
    elif source.format == "text":
        yield Unit(kind="texts", sources=(index,), payload=[sys.stdin.buffer.read()])
    elif source.format == "parquet":
        groups = _row_groups(source)
        bounds = [source.bytes * group // max(groups, 1) for group in range(groups + 1)]
        yield from _ranges("rows", source, index, bounds, range(groups + 1))
    elif source.compression or not source.bytes:
        yield from _block_units(source, index, unit_bytes)
    else:
        bounds = [*range(0, source.bytes, unit_bytes), source.bytes]
        yield from _ranges("range", source, index, bounds, bounds)


def _other_encoding(source: Source) -> tuple[str, str] | None:
    """The problem of JSON in UTF-16, of which every line would be one."""
    if source.path == "-" or source.format not in ("json", "jsonl"):
        return None
    try:
        with opened(source.path, source.compression) as (file, _):
            encoding = other_encoding(file.read(4096))
    except TRUNCATED:
        return None
    return ("invalid UTF-8", encoding) if encoding else None


def _ranges(
    kind: str, source: Source, index: int, bounds: Sequence[int], places: Sequence[int]
) -> Iterator[Unit]:
    """Units between neighbours in `bounds` (bytes) and `places` (bytes or row groups)."""
    for n in range(len(bounds) - 1):
        yield Unit(
            kind=kind,
            sources=(index,),
            files=((source.path, ""),),
            start=places[n],
            end=places[n + 1],
            size=bounds[n + 1] - bounds[n],
            last=n == len(bounds) - 2,
        )


def _row_groups(source: Source) -> int:
    """Row groups of a Parquet file; one when it cannot be read, so that a worker says so."""
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.ParquetFile(source.path).num_row_groups)
    except (pyarrow.ArrowException, OSError, ValueError):
        return 1


def _elements(source: Source) -> Iterator[tuple[Any, int]]:
    """(element, bytes read so far) of a JSON array. Raises Damaged where reading has to stop."""
    try:
        with opened(source.path, source.compression) as (file, raw):
            for element in array_elements(file):
                yield element, raw.tell() if source.bytes else 0
    except TRUNCATED as error:
        raise Damaged(*why_unreadable(error)) from None
    except ValueError as error:
        raise Damaged("truncated or damaged file", str(error)) from None


def _text_units(
    texts: Iterable[tuple[Any, int]], source: Source, index: int, unit_bytes: int
) -> Iterator[Unit]:
    batch: list[Any] = []
    size = before = 0
    problem = None
    try:
        for text, read in texts:
            if size >= unit_bytes:
                yield Unit(
                    kind="texts", sources=(index,), payload=batch, size=read - before, last=False
                )
                batch, size, before = [], 0, read
            batch.append(text)
            values = text.values() if isinstance(text, dict) else (text,)
            size += 1 + sum(len(value) for value in values if isinstance(value, str | bytes))
    except Damaged as error:
        problem = error.args
    size = source.bytes - before
    yield Unit(kind="texts", sources=(index,), payload=batch, size=size, problem=problem)


def _block_units(source: Source, index: int, unit_bytes: int) -> Iterator[Unit]:
    """Blocks of whole lines from a stream that has to be read in sequence."""
    rest, problem, before = b"", None, 0
    try:
        with opened(source.path, source.compression) as (file, raw):
            rest = file.read(len(BOM)).removeprefix(BOM)
            while block := _block(file, unit_bytes):
                cut = block.rfind(b"\n") + 1
                lines, rest = rest + block[:cut], block[cut:]
                if not cut:
                    rest = lines + rest
                    continue
                read = raw.tell() if source.bytes else 0
                yield Unit(
                    kind="block", sources=(index,), payload=lines, size=read - before, last=False
                )
                before = read
    except TRUNCATED as error:
        # The line that was being read is lost with the rest of the file.
        rest, problem = b"", why_unreadable(error)
    size = source.bytes - before
    yield Unit(kind="block", sources=(index,), payload=rest, size=size, problem=problem)


def _block(file: IO[bytes], size: int) -> bytes:
    """The next `size` bytes, or what comes before the byte where the stream is damaged."""
    parts: list[bytes] = []
    try:
        while size > 0 and (part := file.read1(size)):  # type: ignore[attr-defined]
            parts.append(part)
            size -= len(part)
    except TRUNCATED:
        if not parts:
            raise
    return b"".join(parts)

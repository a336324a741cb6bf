"""Inputs of a preparation: which files, in which format, cut into which units of work.

Units depend on the inputs alone, never on the number of workers; unit by unit in order they hold
all documents in order. A unit is about 8 MB: a byte range of JSON lines (the worker finds the
line ends), some text files, a row group of Parquet, or a block that had to be read in sequence
(compressed lines, standard input, an iterator of documents) and travels to the worker.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megagpt.corpus.array import array_elements
from megagpt.corpus.stream import COMPRESSIONS, TRUNCATED, open_both, open_stream
from megagpt.errors import UsageError

UNIT_BYTES = 8 << 20
BOM = b"\xef\xbb\xbf"
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


@dataclass(frozen=True)
class Unit:
    """One piece of work. `kind` decides which of the other fields mean something."""

    number: int
    kind: str
    """range | files | rows | block | texts"""
    sources: tuple[int, ...]
    """Places of its sources in the list of sources; one unless `files`."""
    paths: tuple[str, ...] = ()
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
    problem: str = ""
    """What went wrong after the payload, when reading the source had to stop."""
    formats: tuple[str, ...] = ()
    """files: the compression of each."""


@dataclass
class Inputs:
    """What `find_sources` found."""

    sources: list[Source] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    """Files that were named more than once; only the first counts."""
    others: int = 0
    """Files of folders with endings that are not known."""


def find_sources(inputs: Iterable[str | Path | Documents], format: str | None = None) -> Inputs:
    """Expand files, folders, globs, `-` and `Documents` into sources, in the order given; the
    files of a folder or glob are sorted by path. `format` is used for every file.

    Raises UsageError for an input that does not exist or whose ending means no format.
    """
    found = Inputs()
    seen: set[tuple[int, int]] = set()
    for item in inputs:
        if isinstance(item, Documents):
            found.sources.append(Source(item.name, "documents", documents=item))
        elif str(item) == "-":
            found.sources.append(Source("-", format or "jsonl"))
        else:
            _add_path(found, str(item), format, seen)
    return found


def _add_path(found: Inputs, item: str, format: str | None, seen: set[tuple[int, int]]) -> None:
    named = os.path.isfile(item)
    paths: Iterable[str]
    if named:
        paths = [item]
    elif os.path.isdir(item):
        paths = _walk(item)
    else:
        matches = sorted(glob.glob(item, recursive=True)) if glob.has_magic(item) else []
        paths = [path for path in matches if os.path.isfile(path)]
        if not paths:
            raise UsageError(f"input {item}: no such file or folder, and no file matches it")
    for path in paths:
        kind, compression = _format(path, format)
        if not kind:
            if named:
                raise UsageError(
                    f"input {path}: its ending is none of {', '.join(SUFFIXES)} (or these with "
                    f"{', '.join(COMPRESSIONS)}); say what it holds with --format"
                )
            found.others += 1
            continue
        try:
            stat = os.stat(path)
        except OSError:  # a dangling link in a folder
            found.others += 1
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            found.twice.append(path)
            continue
        seen.add((stat.st_dev, stat.st_ino))
        found.sources.append(Source(path, kind, compression, stat.st_size, stat.st_mtime_ns))


def _walk(folder: str) -> Iterator[str]:
    """All regular files below a folder, sorted by path; hidden ones left out."""
    paths = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(root, name) for name in files if not name.startswith(".")]
    return iter(sorted(path for path in paths if os.path.isfile(path)))


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
        with open_stream(path, compression) as file:
            return file.read(4096).removeprefix(BOM).lstrip()[:1]
    except TRUNCATED:
        return b""


def plan_units(sources: Sequence[Source], unit_bytes: int = UNIT_BYTES) -> Iterator[Unit]:
    """The units of all sources in order. Sequential sources are read while iterating."""
    number = 0
    waiting: list[int] = []

    def files() -> Iterator[Unit]:
        if waiting:
            yield Unit(
                number,
                "files",
                tuple(waiting),
                tuple(sources[place].path for place in waiting),
                size=size,
                formats=tuple(sources[place].compression for place in waiting),
            )
            waiting.clear()

    size = 0
    for place, source in enumerate(sources):
        if source.format == "text" and source.path != "-":
            if waiting and size + source.bytes > unit_bytes:
                for unit in files():
                    yield unit
                    number += 1
                size = 0
            waiting.append(place)
            size += source.bytes
            continue
        for unit in files():
            yield unit
            number += 1
        size = 0
        for unit in _source_units(source, place, number, unit_bytes):
            yield unit
            number += 1
    yield from files()


def _source_units(source: Source, place: int, number: int, unit_bytes: int) -> Iterator[Unit]:
    if source.format == "documents":
        assert source.documents is not None
        texts = ((text, "", 0) for text in source.documents.texts())
        yield from _text_units(texts, source, place, number, unit_bytes)
    elif source.format == "json":
        yield from _text_units(_elements(source), source, place, number, unit_bytes)
    elif source.format == "parquet":
        groups = _row_groups(source)
        for group in range(groups):
            size = source.bytes * (group + 1) // groups - source.bytes * group // groups
            yield Unit(
                number + group,
                "rows",
                (place,),
                (source.path,),
                start=group,
                size=size,
                last=group == groups - 1,
            )
    elif source.format == "text":
        yield Unit(number, "texts", (place,), payload=[sys.stdin.buffer.read()])
    elif source.compression or source.path == "-":
        yield from _block_units(source, place, number, unit_bytes)
    else:
        for start in range(0, source.bytes, unit_bytes):
            end = min(start + unit_bytes, source.bytes)
            yield Unit(
                number,
                "range",
                (place,),
                (source.path,),
                start=start,
                end=end,
                size=end - start,
                last=end == source.bytes,
            )
            number += 1


def _row_groups(source: Source) -> int:
    """Row groups of a Parquet file; one when it cannot be read, so that a worker says so."""
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.ParquetFile(source.path).num_row_groups)
    except (pyarrow.ArrowException, OSError):
        return 1


def _elements(source: Source) -> Iterator[tuple[Any, str, int]]:
    """(element, "", bytes read so far) of a JSON array, and (None, problem, 0) where reading had
    to stop."""
    try:
        with open_both(source.path, source.compression) as (file, raw):
            for element in array_elements(file):
                yield element, "", raw.tell()
    except TRUNCATED as error:
        yield None, f"cut short or damaged: {error}", 0
    except ValueError as error:
        yield None, str(error), 0


def _text_units(
    texts: Iterable[tuple[Any, str, int]], source: Source, place: int, number: int, unit_bytes: int
) -> Iterator[Unit]:
    batch: list[Any] = []
    size = before = 0
    problem = ""
    for text, problem, read in texts:
        if problem:
            break
        if size >= unit_bytes:
            own = read - before
            yield Unit(number, "texts", (place,), payload=batch, size=own, last=False)
            batch, size, number, before = [], 0, number + 1, read
        batch.append(text)
        if isinstance(text, dict):
            size += sum(len(value) for value in text.values() if isinstance(value, str))
        size += (len(text) if isinstance(text, str | bytes) else 0) + 1
    own = source.bytes - before
    yield Unit(number, "texts", (place,), payload=batch, size=own, problem=problem)


def _block(file: IO[bytes], size: int) -> bytes:
    """The next `size` bytes, or what comes before a place where the stream is damaged."""
    parts: list[bytes] = []
    try:
        while size > 0 and (part := file.read1(size)):  # type: ignore[attr-defined]
            parts.append(part)
            size -= len(part)
    except TRUNCATED:
        if not parts:
            raise
    return b"".join(parts)


def _block_units(source: Source, place: int, number: int, unit_bytes: int) -> Iterator[Unit]:
    """Blocks of whole lines from a stream that has to be read in sequence."""
    rest = b""
    problem = ""
    before = 0
    try:
        with open_both(source.path, source.compression) as (file, raw):
            rest = file.read(len(BOM)).removeprefix(BOM)
            while block := _block(file, unit_bytes):
                cut = block.rfind(b"\n") + 1
                if not cut:
                    rest += block
                    continue
                payload, rest = rest + block[:cut], block[cut:]
                read = raw.tell() if source.bytes else 0
                own = read - before
                yield Unit(number, "block", (place,), payload=payload, size=own, last=False)
                number, before = number + 1, read
    except TRUNCATED as error:
        # The line that was being read is lost with the rest of the file.
        rest, problem = b"", f"cut short or damaged: {error}"
    own = source.bytes - before
    yield Unit(number, "block", (place,), payload=rest, size=own, problem=problem)

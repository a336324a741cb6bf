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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from megagpt.corpus.open import BOM, COMPRESSIONS, TRUNCATED, array_elements, opened
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
    problem: str = ""
    """What went wrong after the payload, when reading the source had to stop."""


@dataclass
class Inputs:
    """What `find_sources` found."""

    sources: list[Source] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    """Files that were named more than once; only the first counts."""
    others: int = 0
    """Files of folders with endings that are not known."""


class Damaged(Exception):
    """Reading a source had to stop; what came before is good."""


# --- which files --------------------------------------------------------------------------------


def find_sources(inputs: Iterable[str | Path | Documents], format: str | None = None) -> Inputs:
    """Expand files, folders, globs, `-` and `Documents` into sources, in the order given; the
    files of a folder or glob are sorted by path. `format` is used for every file.

    Raises UsageError for an input that does not exist or whose ending means no format.
    """
    inputs_found = Inputs()
    seen: set[tuple[int, int]] = set()
    for item in inputs:
        if isinstance(item, Documents):
            inputs_found.sources.append(Source(item.name, "documents", documents=item))
        elif str(item) == "-":
            inputs_found.sources.append(Source("-", format or "jsonl"))
        else:
            for path in _expand(str(item)):
                _add_file(inputs_found, path, format, seen, named=path == str(item))
    return inputs_found


def _expand(item: str) -> list[str]:
    """The files that a path or glob means. Raises UsageError when there is none."""
    if os.path.isfile(item):
        return [item]
    if os.path.isdir(item):
        return _files_below(item)
    matches = sorted(glob.glob(item, recursive=True)) if glob.has_magic(item) else []
    paths = [path for path in matches if os.path.isfile(path)]
    if not paths:
        raise UsageError(f"input {item}: no such file or folder, and no file matches it")
    return paths


def _add_file(
    inputs: Inputs, path: str, format: str | None, seen: set[tuple[int, int]], named: bool
) -> None:
    kind, compression = _format(path, format)
    if not kind and named:
        raise UsageError(
            f"input {path}: its ending is none of {', '.join(SUFFIXES)} (or these with "
            f"{', '.join(COMPRESSIONS)}); say what it holds with --format"
        )
    try:
        stat = os.stat(path)
    except OSError:  # a dangling link in a folder
        kind = ""
    if not kind:
        inputs.others += 1
    elif (stat.st_dev, stat.st_ino) in seen:
        inputs.twice.append(path)
    else:
        seen.add((stat.st_dev, stat.st_ino))
        inputs.sources.append(Source(path, kind, compression, stat.st_size, stat.st_mtime_ns))


def _files_below(folder: str) -> list[str]:
    """All regular files below a folder, sorted by path; hidden ones left out."""
    paths = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(root, name) for name in files if not name.startswith(".")]
    return sorted(path for path in paths if os.path.isfile(path))


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
    elif source.format == "json":
        yield from _text_units(_elements(source), source, index, unit_bytes)
    elif source.format == "text":
        yield Unit(kind="texts", sources=(index,), payload=[sys.stdin.buffer.read()])
    elif source.format == "parquet":
        groups = _row_groups(source)
        bounds = [source.bytes * group // max(groups, 1) for group in range(groups + 1)]
        yield from _ranges("rows", source, index, bounds, range(groups + 1))
    elif source.compression or source.path == "-":
        yield from _block_units(source, index, unit_bytes)
    else:
        bounds = [*range(0, source.bytes, unit_bytes), source.bytes]
        yield from _ranges("range", source, index, bounds, bounds)


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
    except (pyarrow.ArrowException, OSError):
        return 1


def _elements(source: Source) -> Iterator[tuple[Any, int]]:
    """(element, bytes read so far) of a JSON array. Raises Damaged where reading has to stop."""
    try:
        with opened(source.path, source.compression) as (file, raw):
            for element in array_elements(file):
                yield element, raw.tell()
    except TRUNCATED as error:
        raise Damaged(f"cut short or damaged: {error}") from None
    except ValueError as error:
        raise Damaged(str(error)) from None


def _text_units(
    texts: Iterable[tuple[Any, int]], source: Source, index: int, unit_bytes: int
) -> Iterator[Unit]:
    batch: list[Any] = []
    size = before = 0
    problem = ""
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
        problem = str(error)
    size = source.bytes - before
    yield Unit(kind="texts", sources=(index,), payload=batch, size=size, problem=problem)


def _block_units(source: Source, index: int, unit_bytes: int) -> Iterator[Unit]:
    """Blocks of whole lines from a stream that has to be read in sequence."""
    rest, problem, before = b"", "", 0
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
        rest, problem = b"", f"cut short or damaged: {error}"
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

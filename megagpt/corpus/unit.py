"""Sources cut into units of work.

Units depend on the inputs alone, never on the number of workers; unit by unit in order they hold
all documents in order. A unit is about 8 MB: a byte range of JSON lines (the worker finds the
line ends), some text files, a row group of Parquet, or a block that had to be read in sequence
(compressed lines, standard input, an iterator of documents) and travels to the worker.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from megagpt.corpus.array import array_elements, rest_left_out
from megagpt.corpus.documents import Source
from megagpt.corpus.open import BOM, TRUNCATED, head_of, opened, other_encoding, why_unreadable

UNIT_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work. `kind` decides which of the other fields mean something."""

    number: int = 0
    kind: str
    """range | files | rows | block | texts"""
    sources: tuple[int, ...] = ()
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
    """block: bytes of whole lines; texts: a list, of which the last may be a Broken that says why
    reading had to stop."""


def plan_units(sources: Sequence[Source], unit_bytes: int = UNIT_BYTES) -> Iterator[Unit]:
    """The units of all sources in order. Sequential sources are read while iterating."""
    for number, unit in enumerate(_units(sources, unit_bytes)):
        yield replace(unit, number=number)


def _units(sources: Sequence[Source], unit_bytes: int) -> Iterator[Unit]:
    texts: dict[int, Source] = {}
    size = 0
    for index, source in enumerate(sources):
        is_text_file = source.format == "text" and source.is_file
        if texts and (not is_text_file or size + source.bytes > unit_bytes):
            yield _files_unit(texts, size)
            texts, size = {}, 0
        if is_text_file:
            texts[index] = source
            size += source.bytes
        else:
            yield from (replace(unit, sources=(index,)) for unit in _parts(source, unit_bytes))
    if texts:
        yield _files_unit(texts, size)


def _files_unit(texts: dict[int, Source], size: int) -> Unit:
    files = tuple((source.path, source.compression) for source in texts.values())
    return Unit(kind="files", sources=tuple(texts), files=files, size=size)


def _parts(source: Source, unit_bytes: int) -> Iterator[Unit]:
    """The units of one source, which do not know its index."""
    is_json = source.is_file and source.format in ("json", "jsonl")
    if source.documents is not None:
        yield from _text_units(((text, 0) for text in source.documents.texts()), 0, unit_bytes)
    elif encoding := other_encoding(head_of(source.path, source.compression) if is_json else b""):
        # Of JSON in UTF-16 every line would be a problem.
        broken = [rest_left_out("invalid UTF-8", encoding)]
        yield Unit(kind="texts", payload=broken, size=source.bytes)
    elif source.format == "json":
        yield from _text_units(_elements(source), source.bytes, unit_bytes)
    elif source.format == "text":
        yield Unit(kind="texts", payload=[sys.stdin.buffer.read()])
    elif source.format == "parquet":
        groups = _row_groups(source)
        bounds = [source.bytes * group // max(groups, 1) for group in range(groups + 1)]
        yield from _ranges("rows", source, bounds, range(groups + 1))
    elif source.compression or not source.bytes:
        yield from _block_units(source, unit_bytes)
    else:
        bounds = [*range(0, source.bytes, unit_bytes), source.bytes]
        yield from _ranges("range", source, bounds, bounds)


def _ranges(
    kind: str, source: Source, bounds: Sequence[int], places: Sequence[int]
) -> Iterator[Unit]:
    """Units between neighbours in `bounds` (bytes) and `places` (bytes or row groups)."""
    for n in range(len(bounds) - 1):
        yield Unit(
            kind=kind,
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
    """(element, bytes read so far) of a JSON array; a Broken where reading has to stop."""
    try:
        with opened(source.path, source.compression) as (file, raw):
            for element in array_elements(file):
                yield element, raw.tell() if source.bytes else 0
    except (*TRUNCATED, ValueError) as error:
        yield rest_left_out(*why_unreadable(error)), source.bytes


def _text_units(
    texts: Iterable[tuple[Any, int]], source_bytes: int, unit_bytes: int
) -> Iterator[Unit]:
    """Units of elements that come with the bytes read so far."""
    batch: list[Any] = []
    size = before = 0
    for text, read in texts:
        if size >= unit_bytes:
            yield Unit(kind="texts", payload=batch, size=read - before, last=False)
            batch, size, before = [], 0, read
        batch.append(text)
        values = text.values() if isinstance(text, dict) else (text,)
        size += 1 + sum(len(value) for value in values if isinstance(value, str | bytes))
    yield Unit(kind="texts", payload=batch, size=source_bytes - before)


def _block_units(source: Source, unit_bytes: int) -> Iterator[Unit]:
    """Blocks of whole lines from a stream that has to be read in sequence."""
    rest, before = b"", 0
    try:
        with opened(source.path, source.compression) as (file, raw):
            rest = file.read(len(BOM)).removeprefix(BOM)
            for block in _blocks(file, unit_bytes):
                lines = rest + block
                cut = lines.rfind(b"\n") + 1
                lines, rest = lines[:cut], lines[cut:]
                if lines:
                    start, before = before, raw.tell() if source.bytes else 0
                    yield Unit(kind="block", payload=lines, size=before - start, last=False)
        yield Unit(kind="block", payload=rest, size=source.bytes - before)
    except TRUNCATED as error:
        # The line that was being read is lost with the rest of the file.
        broken = [rest_left_out(*why_unreadable(error))]
        yield Unit(kind="texts", payload=broken, size=source.bytes - before)


def _blocks(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Blocks of `size` bytes, the last of what is left. Where the stream is damaged, what comes
    before is a block too; then one of TRUNCATED is raised."""
    parts: list[bytes] = []
    try:
        while part := file.read1(size - sum(map(len, parts))):  # type: ignore[attr-defined]
            parts.append(part)
            if sum(map(len, parts)) == size:
                yield b"".join(parts)
                parts = []
    except TRUNCATED:
        yield b"".join(parts)
        raise
    yield b"".join(parts)

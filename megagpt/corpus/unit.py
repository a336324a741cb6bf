"""What a worker does with one unit: its documents in order, or why one is none."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megagpt.corpus.source import BOM, Unit
from megagpt.corpus.stream import TRUNCATED, open_stream

LARGE_FILE = 8 << 20
"""Text files above this size are read and encoded in pieces."""
ROWS = 256
"""Rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True)
class Problem:
    """Why a document was left out."""

    reason: str
    """The same for all problems of a kind; empty for a blank line, which is none."""
    detail: str = ""
    path: str = ""
    """Of a whole file; otherwise the place is the number of the line or document."""


@dataclass(frozen=True)
class LargeText:
    """A text file to be read in pieces."""

    path: str
    compression: str

    def pieces(self) -> Iterator[str]:
        """The decoded text; raises UnicodeDecodeError and what damaged compression raises."""
        decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        with open_stream(self.path, self.compression) as file:
            while block := file.read(1 << 22):
                yield decode(block)
        yield decode(b"", True)


BLANK = Problem("")
Item = str | Problem | LargeText


def unit_items(unit: Unit, text_field: str) -> Iterator[Item]:
    """One item for each line, row, file or element of the unit, in order."""
    if unit.kind == "range":
        for line in _range_lines(unit):
            yield _line_item(line, text_field)
    elif unit.kind == "block":
        for line in _lines(unit.payload):
            yield _line_item(line, text_field)
    elif unit.kind == "files":
        for path, compression in zip(unit.paths, unit.formats, strict=True):
            yield _file_item(path, compression)
    elif unit.kind == "rows":
        yield from _row_items(unit, text_field)
    else:
        for element in unit.payload:
            yield _element_item(element, text_field)
    if unit.problem:
        yield Problem("truncated or damaged file", f"{unit.problem}; the rest of it is left out")


def _range_lines(unit: Unit) -> list[bytes]:
    """The lines that start in [start, end) of a file."""
    with open(unit.paths[0], "rb") as file:
        if unit.start == 0:
            block = file.read(unit.end)
            block = block.removeprefix(BOM)
        else:
            # The byte before tells whether a line starts at `start`.
            file.seek(unit.start - 1)
            block = file.read(unit.end - unit.start + 1)
            first = block.find(b"\n", 0, len(block) - 1) + 1
            if not first:
                return []
            block = block[first:]
        if not block.endswith(b"\n"):
            block += file.readline()
    return _lines(block)


def _lines(block: bytes) -> list[bytes]:
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _line_item(line: bytes, text_field: str) -> Item:
    import orjson

    try:
        element = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not line.strip():
            return BLANK
        try:
            # Takes what orjson refuses and Python writes: NaN, and escapes of lone surrogates.
            element = json.loads(line)
        except UnicodeDecodeError as wrong:
            return Problem("invalid UTF-8", f"byte {wrong.start + 1} of the line: {wrong.reason}")
        except (ValueError, RecursionError):
            return Problem("broken JSON", str(error))
    return _element_item(element, text_field)


def _element_item(element: Any, text_field: str) -> Item:
    """The text of an object, or of a string or bytes that stand alone."""
    if isinstance(element, dict):
        if text_field not in element:
            names = ", ".join(list(element)[:8]) or "none"
            return Problem("missing text field", f"no field {text_field!r} (fields: {names})")
        element = element[text_field]
    if isinstance(element, bytes):
        return _decoded(element)
    if not isinstance(element, str):
        return Problem("text is not a string", f"it is {type(element).__name__}")
    return element if element else Problem("empty document")


def _decoded(content: bytes, path: str = "") -> Item:
    try:
        text = content.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", f"byte {error.start + 1}: {error.reason}", path)
    return text if text else Problem("empty document", path=path)


def _file_item(path: str, compression: str) -> Item:
    try:
        if os.path.getsize(path) > (LARGE_FILE >> 2 if compression else LARGE_FILE):
            return LargeText(path, compression)
        with open_stream(path, compression) as file:
            return _decoded(file.read(), path)
    except (EOFError, *TRUNCATED) as error:
        return file_problem(path, compression, error)


def file_problem(path: str, compression: str, error: Exception) -> Problem:
    """What a file that cannot be read to its end is reported as."""
    if isinstance(error, OSError) and error.errno is not None:
        return Problem("unreadable file", error.strerror or str(error), path)
    assert compression
    return Problem("truncated or damaged file", str(error), path)


def _row_items(unit: Unit, text_field: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(unit.paths[0])
        if text_field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names[:8])
            yield Problem("missing text field", f"no column {text_field!r} (columns: {names})")
            return
        batches = file.iter_batches(ROWS, row_groups=[unit.start], columns=[text_field])
        for batch in batches:
            for text in batch.column(0).to_pylist():
                yield _element_item(text, text_field)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        detail = str(error).split("\n")[0]
        yield Problem("truncated or damaged file", f"row group {unit.start}: {detail}")

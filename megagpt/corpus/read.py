"""The texts of one unit in order: the first step of the pipe that a worker runs.

    read (here) -> clean -> encode -> write

A document is one `Piece` or, when a text file is long, several; the last one says so. What is no
document is a `Problem`, also when it shows after the first pieces: they count for nothing then.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from megagpt.corpus.documents import Unit
from megagpt.corpus.open import BOM, TRUNCATED, opened

PIECE_BYTES = 1 << 22
"""Text files are read in pieces of so many bytes."""
ROWS = 256
"""Rows of a Parquet file that are in memory at a time."""


Piece = tuple[int, str, bool]
"""Some text of a document: number of the line, row, file or element within the unit, from 0; the
text; whether the document ends with it. A plain tuple: there is one for each short line."""


class Problem(NamedTuple):
    """Why a document was left out."""

    item: int
    reason: str
    """The same for all problems of a kind; empty for a blank line, which is none."""
    detail: str = ""
    path: str = ""
    """Of a whole file; otherwise the item says where it is."""


Item = Piece | Problem


def read(unit: Unit, text_field: str) -> Iterator[Item]:
    """The pieces and problems of every line, row, file or element of the unit, in order."""
    if unit.kind == "files":
        for item, (path, compression) in enumerate(unit.files):
            yield from _file(item, path, compression)
        return
    if unit.kind == "rows":
        yield from _rows(unit, text_field)
        return
    item = -1
    if unit.kind == "texts":
        for item, element in enumerate(unit.payload):
            yield _element(item, element, text_field)
    else:
        for item, line in enumerate(_lines(unit)):
            yield _line(item, line, text_field)
    if unit.problem:
        detail = f"{unit.problem}; the rest of it is left out"
        yield Problem(item + 1, "truncated or damaged file", detail)


def join(items: Iterable[Item]) -> Iterator[Item]:
    """The same with every document in one piece."""
    before: list[str] = []
    for item in items:
        if not isinstance(item, Problem):
            number, text, last = item
            if not last:
                before.append(text)
                continue
            if before:
                item = (number, "".join((*before, text)), True)
        before = []
        yield item


def texts(unit: Unit, text_field: str) -> Iterator[str]:
    """The whole documents of a unit, without those that have a problem."""
    for item in join(read(unit, text_field)):
        if not isinstance(item, Problem):
            yield item[1]


def utf8(text: str) -> tuple[str, bytes]:
    """A text that UTF-8 can say, and its bytes. As with tiktoken, a pair of surrogates becomes one
    character and a lone one U+FFFD."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text, text.encode()


def _lines(unit: Unit) -> list[bytes]:
    """The lines of a block, or those that start in [start, end) of a file."""
    block = unit.payload if unit.kind == "block" else _range(unit)
    lines: list[bytes] = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _range(unit: Unit) -> bytes:
    with open(unit.files[0][0], "rb") as file:
        if unit.start == 0:
            block = file.read(unit.end).removeprefix(BOM)
        else:
            # The byte before tells whether a line starts at `start`.
            file.seek(unit.start - 1)
            block = file.read(unit.end - unit.start + 1)
            first = block.find(b"\n", 0, len(block) - 1) + 1
            if not first:
                return b""
            block = block[first:]
        return block if block.endswith(b"\n") else block + file.readline()


def _line(item: int, line: bytes, text_field: str) -> Item:
    import orjson

    try:
        element = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not line.strip():
            return Problem(item, "")
        try:
            # Takes what orjson refuses and Python writes: NaN, and escapes of lone surrogates.
            element = json.loads(line)
        except UnicodeDecodeError as wrong:
            detail = f"byte {wrong.start + 1} of the line: {wrong.reason}"
            return Problem(item, "invalid UTF-8", detail)
        except (ValueError, RecursionError):
            return Problem(item, "broken JSON", str(error))
    return _element(item, element, text_field)


def _element(item: int, element: Any, text_field: str) -> Item:
    """The text of an object, or of a string or bytes that stand alone."""
    if isinstance(element, dict):
        if text_field not in element:
            names = ", ".join(list(element)[:8]) or "none"
            detail = f"no field {text_field!r} (fields: {names})"
            return Problem(item, "missing text field", detail)
        element = element[text_field]
    if isinstance(element, bytes):
        try:
            element = element.removeprefix(BOM).decode()
        except UnicodeDecodeError as error:
            return Problem(item, "invalid UTF-8", f"byte {error.start + 1}: {error.reason}")
    if not isinstance(element, str):
        return Problem(item, "text is not a string", f"it is {type(element).__name__}")
    return (item, element, True) if element else Problem(item, "empty document")


def _file(item: int, path: str, compression: str) -> Iterator[Item]:
    """A text file, one document."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = 0  # decoded bytes
    last = False
    try:
        with opened(path, compression) as (file, _):
            block = file.read(PIECE_BYTES)
            last = len(block) < PIECE_BYTES
            block = block.removeprefix(BOM)
            if last and not block:
                yield Problem(item, "empty document", path=path)
                return
            while True:
                waiting = len(decoder.getstate()[0])
                yield item, decoder.decode(block, last), last
                if last:
                    return
                before += len(block)
                block = file.read(PIECE_BYTES)
                last = len(block) < PIECE_BYTES
    except UnicodeDecodeError as error:
        detail = f"byte {before - waiting + error.start + 1}: {error.reason}"
        yield Problem(item, "invalid UTF-8", detail, path)
    except TRUNCATED as error:
        if isinstance(error, OSError) and error.errno is not None:
            yield Problem(item, "unreadable file", error.strerror or str(error), path)
        else:
            yield Problem(item, "truncated or damaged file", str(error), path)


def _rows(unit: Unit, text_field: str) -> Iterator[Item]:
    """A row group of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    item = -1
    try:
        file = pyarrow.parquet.ParquetFile(unit.files[0][0])
        if text_field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names[:8])
            detail = f"no column {text_field!r} (columns: {names})"
            yield Problem(0, "missing text field", detail)
            return
        for batch in file.iter_batches(ROWS, row_groups=[unit.start], columns=[text_field]):
            for text in batch.column(0).to_pylist():
                item += 1
                yield _element(item, text, text_field)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        detail = f"row group {unit.start}: " + str(error).split("\n")[0]
        yield Problem(item + 1, "truncated or damaged file", detail)

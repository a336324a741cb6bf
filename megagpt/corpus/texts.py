"""The texts of one unit in order: the first step of the pipe that a worker runs.

    read (here) -> clean -> encode -> write (part.py)

A document is one `Piece` or, when a text file is long, several; the last one says so. What is no
document is a `Problem`, also when it shows after the first pieces: they count for nothing then.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from megagpt.corpus.array import Broken, rest_left_out
from megagpt.corpus.open import BOM, TRUNCATED, archive, opened, other_encoding, why_unreadable
from megagpt.corpus.unit import Unit

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
    if unit.kind == "texts":
        for item, element in enumerate(unit.payload):
            yield _element(item, element, text_field)
        return
    try:
        lines = _lines(unit)
    except OSError as error:
        yield _element(0, rest_left_out(*why_unreadable(error)), text_field)
        return
    for item, line in enumerate(lines):
        yield _line(item, line, text_field)


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
            # Takes what orjson refuses and Python writes: NaN, escapes of lone surrogates; and
            # nobody reads the numbers, so that they may have any number of digits.
            element = json.loads(line, parse_int=float)
        except UnicodeDecodeError as wrong:
            detail = f"byte {wrong.start + 1} of the line: {wrong.reason}"
            return Problem(item, "invalid UTF-8", detail)
        except RecursionError:
            return Problem(item, "broken JSON", "nested too deeply")
        except ValueError:
            return Problem(item, "broken JSON", str(error))
    return _element(item, element, text_field)


def _element(item: int, element: Any, text_field: str) -> Item:
    """The text of an object, or of a string or bytes that stand alone."""
    if isinstance(element, Broken):
        return Problem(item, element.reason, element.detail)
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
            if encoding := other_encoding(block[:4096]):
                yield Problem(item, "invalid UTF-8", encoding, path)
                return
            if packed := archive(block):
                yield Problem(item, "no text", packed, path)
                return
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
        yield Problem(item, *why_unreadable(error), path)


def _rows(unit: Unit, text_field: str) -> Iterator[Item]:
    """A row group of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    item = count = 0
    try:
        file = pyarrow.parquet.ParquetFile(unit.files[0][0], page_checksum_verification=True)
        if text_field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names[:8])
            detail = f"no column {text_field!r} (columns: {names})"
            yield Problem(0, "missing text field", detail)
            return
        if file.num_row_groups:
            count = file.metadata.row_group(unit.start).num_rows
        for batch in file.iter_batches(ROWS, row_groups=[unit.start], columns=[text_field]):
            for value in _values(batch.column(0)):
                yield _element(item, value, text_field)
                item += 1
        if item < count:
            raise ValueError(f"{item} of {count} rows are there")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason, detail = "truncated or damaged file", str(error).split("\n")[0]
        if isinstance(error, OSError):
            reason, detail = why_unreadable(error)
        # Each of them counts.
        for lost in range(item, max(count, item + 1)):
            yield Problem(lost, reason, f"row group {unit.start}: {detail}")


def _values(column: Any) -> Iterable[Any]:
    """The values of some rows; one that is no UTF-8 does not take the others with it."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Broken(f"byte {error.start + 1}: {error.reason}", "invalid UTF-8")

"""The bytes of an input file, decompressed as they are read, and the elements of a JSON array."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from backports import zstd

BOM = b"\xef\xbb\xbf"
COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}
TRUNCATED = (EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError, OSError)
"""What a cut or damaged compressed file raises."""
# Files of `zstd --long=31`; without it the library refuses windows above 128 MB.
ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}

CHUNK = 1 << 20
_SPACE = " \t\n\r"
_LONGEST_WORD = 16
"""Characters before the end of a chunk in which a cut word, number or escape may begin."""


@contextmanager
def opened(path: str, compression: str) -> Iterator[tuple[Any, Any]]:
    """The decompressed bytes of a file (or of standard input), and the file itself, which knows
    how far it has been read."""
    if path == "-":
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    with open(path, "rb") as raw, _decompressed(raw, compression) as file:
        yield file, raw


def _decompressed(raw: IO[bytes], compression: str) -> Any:
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == "bz2":
        return bz2.BZ2File(raw)
    if compression == "xz":
        return lzma.LZMAFile(raw)
    if compression == "zst":
        return zstd.ZstdFile(raw, options=ZSTD_OPTIONS)
    return raw


class _Window:
    """The part of the stream that has been read and not yet parsed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._start, self._ended = "", 0, False

    def mark(self) -> str:
        """The next character that is not white space, not consumed; empty at the end."""
        while True:
            while self._start < len(self._text) and self._text[self._start] in _SPACE:
                self._start += 1
            if self._start < len(self._text) or self._ended:
                return self._text[self._start : self._start + 1]
            self._more()

    def skip(self) -> None:
        """Consume the character that `mark` gave."""
        self._start += 1

    def element(self) -> Any:
        """Consume one value."""
        while True:
            try:
                value, end = self._parse(self._text, self._start)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - _LONGEST_WORD
                if self._ended or not (cut or error.msg.startswith("Unterminated")):
                    raise
            else:
                # A number that touches the end of the window may go on behind it.
                if end < len(self._text) or self._ended:
                    self._start = end
                    return value
            self._more()

    def _more(self) -> None:
        # As much again as is kept: a huge element is parsed a few times, not once a chunk.
        # read1 gives what comes before a damaged byte, where read would lose it.
        size = max(CHUNK, len(self._text) - self._start)
        block = self._file.read1(size)  # type: ignore[attr-defined]
        self._ended = not block
        self._text = self._text[self._start :] + self._decode(block, self._ended)
        self._start = 0


def array_elements(file: IO[bytes]) -> Iterator[Any]:
    """The elements of the array in `file`; memory holds a chunk and the largest element.

    ijson is faster, and ends at NaN and turns lone surrogates into question marks without a word:
    docs/benchmarks/data_prep.md. Raises ValueError when the file is not an array or breaks the
    rules of JSON somewhere; the elements before that byte have been given.
    """
    window = _Window(file)
    if window.mark() != "[":
        raise ValueError("not a JSON array")
    window.skip()
    mark = window.mark()
    while mark != "]":
        if not mark:
            raise ValueError("the array has no end")
        yield window.element()
        mark = window.mark()
        if mark == ",":
            window.skip()
            mark = window.mark()
            if mark == "]":
                raise ValueError("a comma before the end of the array")
        elif mark and mark != "]":
            raise ValueError(f"{mark!r} between elements of the array")

"""The bytes of an input file, decompressed as they are read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}
TRUNCATED = (EOFError, lzma.LZMAError, zlib.error, OSError)
"""What a cut or damaged compressed file raises."""


@contextmanager
def open_stream(path: str, compression: str) -> Iterator[Any]:
    """The decompressed bytes of a file, or of standard input."""
    with open_both(path, compression) as (file, _):
        yield file


@contextmanager
def open_both(path: str, compression: str) -> Iterator[tuple[Any, Any]]:
    """The same, and the file itself, which knows how far it has been read."""
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
        import zstandard

        return io.BufferedReader(_Frames(zstandard.ZstdDecompressor(max_window_size=1 << 31), raw))
    return raw


class _Frames(io.RawIOBase):
    """All frames of a .zst file; a cut one raises EOFError, which zstandard itself lets pass."""

    def __init__(self, decompressor: Any, raw: IO[bytes]) -> None:
        self._decompressor, self._raw = decompressor, raw
        self._object: Any = None
        self._left = b""
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            if not self._decode():
                return 0
        size = min(len(buffer), len(self._out))
        buffer[:size] = self._out[:size]
        self._out = self._out[size:]
        return size

    def _decode(self) -> bool:
        import zstandard

        block = self._left or self._raw.read(1 << 17)
        if not block:
            if self._object is not None:
                raise EOFError("the last frame is cut short")
            return False
        if self._object is None:
            self._object = self._decompressor.decompressobj()
        try:
            self._out = memoryview(self._object.decompress(block))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        self._left = b""
        if self._object.eof:
            self._left = self._object.unused_data
            self._object = None
        return True

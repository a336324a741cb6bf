"""The bytes of an input file, decompressed as they are read."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from backports import zstd

BOM = b"\xef\xbb\xbf"
COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}
TRUNCATED = (EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError, OSError)
"""What a cut or damaged compressed file raises."""
# Files of `zstd --long=31`; without it the library refuses windows above 128 MB.
ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": partial(zlib.decompressobj, wbits=31),
    "zst": partial(zstd.ZstdDecompressor, options=ZSTD_OPTIONS),
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}
"""Each makes what unpacks one member."""
PACKED = 1 << 13
"""Compressed bytes that are unpacked at a time: what comes before a damaged byte is lost from
their start on."""


@contextmanager
def opened(path: str, compression: str) -> Iterator[tuple[Any, Any]]:
    """The decompressed bytes of a file (or of standard input), and the file itself, which knows
    how far it has been read."""
    if path == "-":
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    with open(path, "rb") as raw:
        yield (io.BufferedReader(_Members(raw, compression)) if compression else raw), raw


def head_of(path: str, compression: str) -> bytes:
    """The first 4096 bytes; none where there is damage, which is named when the file is read."""
    try:
        with opened(path, compression) as (file, _):
            return bytes(file.read(4096))
    except TRUNCATED:
        return b""


def why_unreadable(error: BaseException) -> tuple[str, str]:
    """(reason, detail) of a problem, for one of TRUNCATED and what a reader says of the content."""
    if isinstance(error, OSError) and error.errno is not None:
        return "unreadable file", error.strerror or str(error)
    return "truncated or damaged file", str(error)


def other_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32 in words, when the first bytes of a file say so; else nothing."""
    name: str = json.detect_encoding(head[:4])
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    # Without a byte order mark only zeros tell, every second byte or more of plain text.
    if name.startswith("utf-8") or not (marked or head.count(0) * 4 > len(head)):
        return ""
    name = name[:6].upper()
    return f"it is {name}; convert it: iconv -f {name} -t UTF-8"


def archive(head: bytes) -> str:
    """A tar archive in words, when the first 262 bytes of a file say so; else nothing."""
    return "it is a tar archive; unpack it first" if head[257:262] == b"ustar" else ""


class _Members(io.RawIOBase):
    """What all members of a compressed file hold, one after another.

    The readers of Python's library take a member whose start is damaged, and legal padding, for the
    end of the file, and drop the rest without a word.
    """

    def __init__(self, raw: IO[bytes], compression: str) -> None:
        self._raw, self._kind = raw, compression
        self._packed = b""
        self._member: Any = None
        self._count = 0

    def readable(self) -> bool:
        """A stream for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes. Raises one of TRUNCATED where the file is cut short or damaged."""
        while self._member is not None or self._next():
            # Where the last output was full, a decompressor may need no input and yet give nothing.
            asked = getattr(self._member, "needs_input", True) and not self._packed
            if asked:
                self._packed = self._raw.read(PACKED)
            packed = self._packed
            data = self._member.decompress(packed, len(buffer))
            # zlib gives back what it did not take, the others keep it.
            self._packed = getattr(self._member, "unconsumed_tail", b"")
            if self._member.eof:
                self._packed, self._member = self._member.unused_data, None
            elif asked and not packed and not data:
                raise EOFError("the file ends in the middle of a compressed stream")
            if data:
                buffer[: len(data)] = data
                return len(data)
        return 0

    def _next(self) -> bool:
        """Begin the next member; False when there is none."""
        zeros, size = 0, 1
        while size:
            self._packed = self._packed or self._raw.read(PACKED)
            size = len(self._packed)
            # gzip may be padded to the blocks of a tape, xz to a multiple of four bytes.
            if self._count and self._kind in ("gz", "xz"):
                self._packed = self._packed.lstrip(b"\0")
            zeros += size - len(self._packed)
            if self._packed:
                break
        if self._kind == "xz" and zeros % 4:
            raise lzma.LZMAError("padding that is no multiple of four bytes")
        if not self._packed and not self._count:
            raise EOFError("the file is empty")
        self._count += 1
        if self._packed:
            self._member = DECOMPRESSORS[self._kind]()
        return bool(self._packed)

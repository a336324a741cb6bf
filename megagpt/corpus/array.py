"""Elements of a JSON array one by one, from a stream of any length in bounded memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

CHUNK = 1 << 20
_SPACE = " \t\n\r"
_LONGEST_WORD = 16
"""Characters before the end of a chunk in which a cut word, number or escape may begin."""


class _Window:
    """The part of the stream that has been read and not yet parsed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._place = 0
        self._ended = False

    def mark(self) -> str:
        """The next character that is not white space, not consumed; empty at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _SPACE:
                self._place += 1
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._more()

    def skip(self) -> None:
        """Consume the character that `mark` gave."""
        self._place += 1

    def element(self) -> Any:
        """Consume one value."""
        while True:
            try:
                value, end = self._parse(self._text, self._place)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - _LONGEST_WORD
                if self._ended or not (cut or error.msg.startswith("Unterminated")):
                    raise
            else:
                # A number that touches the end of the window may go on behind it.
                if end < len(self._text) or self._ended:
                    self._place = end
                    return value
            self._more()

    def _more(self) -> None:
        # As much again as is kept: a huge element is parsed a few times, not once a chunk.
        # read1 gives what comes before a damaged place, where read would lose it.
        size = max(CHUNK, len(self._text) - self._place)
        block = self._file.read1(size)  # type: ignore[attr-defined]
        self._ended = not block
        self._text = self._text[self._place :] + self._decode(block, self._ended)
        self._place = 0


def array_elements(file: IO[bytes]) -> Iterator[Any]:
    """The elements of the array in `file`; memory holds a chunk and the largest element.

    Raises ValueError when the file is not an array or breaks the rules of JSON somewhere; the
    elements before that place have been given.
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

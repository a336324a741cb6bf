"""The elements of JSON arrays one by one; one that cannot be read takes no other with it.

ijson is faster, and ends at NaN and turns lone surrogates into question marks without a word:
docs/benchmarks/data_prep.md.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

CHUNK = 1 << 20
NEAR = 1 << 16
"""Characters in which the end of a broken element is looked for by its brackets."""
_LONGEST_WORD = 16
"""Characters before the end of a chunk in which a cut word, number or escape may begin."""
# Files that were put together may have byte order marks in the middle.
_SPACE = re.compile("[ \t\n\r\ufeff]*+")
_OUTSIDE = re.compile(r'[ \t\n\r\ufeff]*+(?:["{\[,\]]|\Z)')
_BEHIND = re.compile(r"[ \t\n\r]*+(?:[,\]]|\Z)")
_UNDECODED = re.compile("[\udc80-\udcff]")
_OPENING = re.compile(r'"|\{\s*+"[^"\\]*+"|')
_PLACE = re.compile(r'[,\[][ \t\n\r]*+(?=["{]|\Z)')
"""Where an element may begin."""
_MARK = re.compile(r'[\s,:\w.+-]*+("(?:[^"\\]++|\\.)*+"(?=\s*+[:,\]}])|["{}\[\]])', re.DOTALL)
"""Words and separators, then a bracket or a string with what may follow one; a quote alone belongs
to something else."""
_WORD = re.compile(r"[\w.+-]*+[ \t\n\r]*+(?=[,\]])")


class Broken(NamedTuple):
    """Stands for an element that cannot be read, or for what is wrong between two."""

    detail: str
    reason: str = "broken JSON"


def rest_left_out(reason: str, detail: str) -> Broken:
    """Stands for what follows where reading a source has to stop."""
    return Broken(f"{detail}; the rest of it is left out", reason)


def array_elements(file: IO[bytes]) -> Iterator[Any]:
    """The elements of the arrays in `file`, and what stands beside arrays; memory holds a chunk and
    the largest element. A Broken stands for each that cannot be read.

    Raises ValueError when the file has no element, or no end.
    """
    window = _Window(file)
    before = ""
    while mark := window.mark():
        if fault := _fault(before, mark, window.inside):
            yield Broken(fault)
        if mark == "," or mark == "[" and not window.inside or mark == "]" and window.inside:
            window.skip()
            window.inside = (
                mark == "[" or mark == "," and (window.inside or window.mark() not in ("[", ""))
            )
            before = mark
        else:
            # A file that begins with nothing else has lost its first bracket.
            window.inside |= not before and mark not in '"{'
            element = window.element()
            yield element
            before = "broken" if isinstance(element, Broken) else "element"
    if window.inside or not before:
        raise ValueError("the array has no end" if before else "not a JSON array")


def _fault(before: str, mark: str, inside: bool) -> str:
    """What is wrong with a mark; `before` is the one before it, `element`, `broken` or nothing."""
    if mark == "," and not inside:
        return "a comma outside the array"
    if mark == "," and before in ("[", ","):
        return "a comma before the first element or another comma"
    if mark == "]" and before == ",":
        return "a comma before the end of the array"
    if mark in '"{[' and before == "element" and inside:
        return f"{mark!r} between elements of the array"
    return ""


class _Window:
    """The part of the stream that has been read and not yet parsed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.inside = False
        """Whether an array has begun and not ended."""
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        # Nobody reads the numbers: as floats they may have any number of digits.
        self._parse = json.JSONDecoder(parse_int=float).raw_decode
        self._text, self._start, self._ended = "", 0, False
        self._opening = ""
        """How the last sound element begins: a string, or an object by its first key."""

    def mark(self) -> str:
        """The next character that is not white space, not consumed; empty at the end."""
        while True:
            self._start = _end(_SPACE, self._text, self._start)
            if self._start < len(self._text) or self._ended:
                return self._text[self._start : self._start + 1]
            self._more()

    def skip(self) -> None:
        """Consume the character that `mark` gave."""
        self._start += 1

    def element(self) -> Any:
        """Consume one value; or what cannot be read, and give a Broken for it."""
        value, end, problem = self._read()
        # A string with text behind it may be what lies between two others, where a quote is lost.
        if not (problem or isinstance(value, dict | list) or self._is_last(end)):
            end = self._see(end)
            problem = "text behind the element" if self._is_quote_lost(end) else ""
        if problem:
            self._pass_over()
            return Broken(problem)
        start, self._start = self._start, end
        if self._decoder.errors == "surrogateescape":
            wrong = _UNDECODED.search(self._text, start, end)
            if wrong:
                return Broken(f"byte {ord(wrong[0]) - 0xDC00:#x}", "invalid UTF-8")
        if not self._text.startswith(self._opening or "never", start):
            self._opening = self._text[start : _end(_OPENING, self._text, start)]
        return value

    def _read(self) -> tuple[Any, int, str]:
        """(value, its end, problem) at the start of the window, which then holds what follows."""
        while True:
            value, end, problem = None, 0, ""
            try:
                value, end = self._parse(self._text, self._start)
                # A number that touches the end of the window may go on behind it.
                cut = _end(_SPACE, self._text, end) == len(self._text)
            except json.JSONDecodeError as error:
                problem = error.msg
                cut = error.pos > len(self._text) - _LONGEST_WORD
                cut |= problem.startswith("Unterminated")
            except RecursionError:
                return None, 0, "nested too deeply"
            if self._ended or not cut:
                return value, end, problem
            self._more()

    def _is_last(self, end: int) -> bool:
        """Whether what stands at `end` may stand behind an element."""
        behind = _BEHIND if self.inside else _OUTSIDE
        return behind.match(self._text, end) is not None

    def _is_quote_lost(self, end: int) -> bool:
        """Whether the next quote does not open an element either: then it is no comma that is
        missing at `end`."""
        text = self._text[end : end + NEAR]
        try:
            quote = text.index('"')
            # An escaped one is text.
            escaped = quote > 0 and text[quote - 1] == "\\"
            return escaped or not _BEHIND.match(text, self._parse(text, quote)[1])
        except (ValueError, RecursionError):
            return True

    def _pass_over(self) -> None:
        """Go behind an element that cannot be read: by its brackets, or to the next place where an
        element like the last sound one can be read and ends as it should."""
        self._see(self._start)
        end = self._bracket_end()
        if end > self._start and self._is_last(end):
            self._start = end
            return
        self._start += 1
        while True:
            found = _PLACE.search(self._text, self._start)
            if found is None or found.end() + len(self._opening) > len(self._text):
                self._start = found.start() if found and not self._ended else len(self._text)
                if self._ended:
                    return
                self._more()
                continue
            self._start = found.end()
            if self._text.startswith(self._opening, self._start):
                _, end, problem = self._read()
                if not problem and self._is_last(end):
                    return

    def _bracket_end(self) -> int:
        """The end of the value at the start of the window by its brackets and quotes; 0 where they
        do not close nearby."""
        text, start = self._text, self._start
        if text[start] not in '"{[':
            word = _WORD.match(text, start, start + NEAR)
            return word.end() if word else 0
        waiting: list[str] = []
        place = start
        while match := _MARK.match(text, place, start + NEAR):
            mark, place = match[1], match.end()
            if mark in "{[":
                waiting.append("}" if mark == "{" else "]")
            elif mark == '"' or mark in "}]" and waiting.pop() != mark:
                return 0
            if not waiting:
                return place
        return 0

    def _see(self, place: int) -> int:
        """Have NEAR characters from `place` on in the window, so that what is decided by them does
        not depend on how the file was read; where `place` is then."""
        while len(self._text) - place < NEAR and not self._ended:
            place -= self._start
            self._more()
        return place

    def _more(self) -> None:
        # As much again as is kept: a huge element is parsed a few times, not once a chunk.
        # read1 gives what comes before a damaged byte, where read would lose it.
        size = max(CHUNK, len(self._text) - self._start)
        block = self._file.read1(size)  # type: ignore[attr-defined]
        self._ended = not block
        try:
            text = self._decoder.decode(block, self._ended)
        except UnicodeDecodeError:
            # From now on bytes that are no UTF-8 become characters that UTF-8 cannot have.
            self._decoder.errors = "surrogateescape"
            text = self._decoder.decode(block, self._ended)
        self._text = self._text[self._start :] + text
        self._start = 0


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where a pattern that matches everywhere ends."""
    match = pattern.match(text, start)
    assert match is not None
    return match.end()

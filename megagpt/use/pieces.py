"""Bytes of tokens into text as soon as it is certain, and where a text stops (L3, without torch).

A character may be spread over several tokens, and the beginning of a stop text may turn out to be
one: both wait.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenRecord:
    """One token of a text, or of a prompt whose tokens are scored."""

    token: int
    offset: int
    """Characters of the text before it."""
    logprob: float | None = None
    """Log of its probability, nats; None where nothing precedes it, or nobody asked."""
    top: list[tuple[int, float]] = field(default_factory=list)
    """(token, log of its probability) of the likeliest, and of this one where it is none."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a text has grown by."""

    text: str
    tokens: tuple[TokenRecord, ...]
    """Those that begin in it."""


class TextStream:
    """The text of tokens that come one by one."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop text was met; nothing follows then."""
        self.length = 0
        """Characters known so far, those that wait among them."""
        self._stops = tuple(stops)
        # Another text's bytes may end within a character; what is none at all is replaced.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = ""

    def push(self, word: bytes) -> str:
        """What is certain with a token's bytes: perhaps nothing, perhaps more than its own."""
        return self._take(self._decoder.decode(word))

    def push_text(self, text: str) -> str:
        """The same for a token that is written as `text`, which ends an unfinished character."""
        return self._take(self._decoder.decode(b"", final=True) + text)

    def end(self) -> str:
        """What waits, when no token follows."""
        if self.stopped:
            return ""
        released = self._take(self._decoder.decode(b"", final=True))
        waiting, self._waiting = ("", "") if self.stopped else (self._waiting, "")
        return released + waiting

    def _take(self, text: str) -> str:
        self.length += len(text)
        text = self._waiting + text
        # The one that is whole first, however the characters came.
        found = [(p + len(stop), p) for stop in self._stops if (p := text.find(stop)) >= 0]
        if found:
            _, place = min(found)
            self.stopped = True
            self.length -= len(text) - place
            return text[:place]
        kept = self._beginning(text)
        self._waiting = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _beginning(self, text: str) -> int:
        """Characters at the end of `text` that may begin a stop text."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if self._begins(text[-n:])), 0)

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


def token_text(word: bytes) -> str:
    """A token as text: bytes that are no whole characters as `bytes:\\xe2\\x80`, so that no two
    tokens look the same."""
    try:
        return word.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in word)

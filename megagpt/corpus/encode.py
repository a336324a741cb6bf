"""The third step of a worker's pipe: texts to tokens. Nothing else ends texts with END-OF-DOCUMENT.

read -> clean -> encode (here) -> write
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.corpus.clean import Note, Text
from megagpt.corpus.texts import Problem
from megagpt.tokenizer import end_of_document
from megagpt.tokenizer.encoder import MARGIN, PIECE, Encoder, pieces

BATCH = 1 << 20
"""Characters that are encoded at a time: bounds a worker's memory."""


class Encoded(NamedTuple):
    """Tokens of documents in a row."""

    tokens: npt.NDArray
    documents: list[Text]
    """The last pieces of those that end in `tokens`."""
    sizes: list[int]
    """Tokens of each, END-OF-DOCUMENT included."""
    unfinished: int
    """Tokens of a document that does not end here, from its start on; they come last."""


def encode(
    steps: Iterable[Text | Problem | Note], encoder: Encoder
) -> Iterator[Encoded | Problem | Note]:
    """Encode the texts, END-OF-DOCUMENT after each document; everything else passes.

    A problem means that the unfinished tokens before it are no document.
    """
    batch = _Batch(encoder)
    for step in steps:
        if isinstance(step, Text):
            batch.add(step)
            if batch.characters >= BATCH:
                yield from batch.encode()
            continue
        if isinstance(step, Problem):
            batch.drop_unfinished()
        yield step
    yield from batch.encode()


class _Batch:
    """Texts that wait to be encoded together."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._end = end_of_document(encoder.encoding)
        self._parts: list[str] = []
        self._ends: list[int] = []
        """Number of parts up to the end of each document."""
        self._documents: list[Text] = []
        self._rest = ""
        """Text after the last safe cut: a token may join it with the next piece."""
        self._searched = 0
        """Characters of it in which there is no other."""
        self._unfinished = 0
        self.characters = 0

    def add(self, text: Text) -> None:
        """The next text."""
        rest = self._rest + text.text
        # Most texts are short, and a generator for each would take a tenth of all time.
        if len(rest) > PIECE:
            *parts, rest = pieces(rest, self._encoder.encoding, self._searched)
            self._parts += parts
            self._searched = max(len(rest) - MARGIN, 0)
        self.characters += len(text.text)
        self._rest = rest
        if text.last:
            self._parts.append(rest)
            self._rest, self._searched = "", 0
            self._ends.append(len(self._parts))
            self._documents.append(text)

    def drop_unfinished(self) -> None:
        """Forget the pieces after the last whole document."""
        del self._parts[self._ends[-1] if self._ends else 0 :]
        self._rest, self._searched, self._unfinished = "", 0, 0

    def encode(self) -> Iterator[Encoded | Problem]:
        """Encode what waits."""
        parts, ends, documents = self._parts, self._ends, self._documents
        self._parts, self._ends, self._documents, self.characters = [], [], [], 0
        if parts:
            yield from self._encode(parts, ends, documents)

    def _encode(
        self, parts: list[str], ends: list[int], documents: list[Text]
    ) -> Iterator[Encoded | Problem]:
        try:
            tokens, sizes = self._encoder.encode_pieces(parts)
        except ValueError as error:
            # A text that comes in several pieces is cut small enough for the tokenizer.
            if not documents:
                raise
            if len(documents) == 1 and ends[-1] == len(parts):
                detail = f"the tokenizer gave up: {error}"
                yield Problem(documents[0].item, "cannot be encoded", detail)
                return
            for document, start, end in zip(documents, [0, *ends], ends, strict=False):
                yield from self._encode(parts[start:end], [end - start], [document])
            if ends[-1] < len(parts):
                yield from self._encode(parts[ends[-1] :], [], [])
            return
        bounds = np.concatenate(([0], np.cumsum(sizes)))
        stops = bounds[np.array(ends, np.intp)]
        lengths = np.diff(stops, prepend=0) + 1
        lengths[:1] += self._unfinished
        if documents:
            self._unfinished = 0
        self._unfinished += int(bounds[-1] - (stops[-1] if documents else 0))
        tokens = np.insert(tokens, stops, self._end)
        yield Encoded(tokens, documents, lengths.tolist(), self._unfinished)

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

Waiting = list[tuple[str, Text | None]]
"""Pieces of text in a row, each with the document that it ends, if it does."""


class Encoded(NamedTuple):
    """Tokens of documents in a row; those behind the last end belong to one that goes on."""

    tokens: npt.NDArray
    documents: list[Text]
    """The last pieces of those that end in `tokens`."""
    ends: npt.NDArray[np.intp]
    """The place in `tokens` behind the END-OF-DOCUMENT of each."""


def encode(
    steps: Iterable[Text | Problem | Note], encoder: Encoder
) -> Iterator[Encoded | Problem | Note]:
    """Encode the texts, END-OF-DOCUMENT after each document; everything else passes.

    A problem means that the tokens before it, behind the last end, are no document.
    """
    waiting: Waiting = []
    size = 0  # characters that wait
    rest = ""  # text behind the last safe cut: a token may join it with the next piece
    searched = 0  # characters of it in which there is no other
    goes_on = False  # whether the last text was a piece of a document that has more
    for step in steps:
        if isinstance(step, Text):
            rest += step.text
            # Most texts are short, and a generator for each would take a tenth of all time.
            if len(rest) > PIECE:
                *parts, rest = pieces(rest, encoder.encoding, searched)
                waiting += [(part, None) for part in parts]
                searched = max(len(rest) - MARGIN, 0)
            if step.last:
                waiting.append((rest, step))
                rest, searched = "", 0
            size += len(step.text)
            # The end of a document whose beginning is written does not wait: a problem of the
            # next one would be taken for its own.
            if size >= BATCH or (goes_on and step.last):
                yield from _encoded(waiting, encoder)
                waiting, size = [], 0
            goes_on = not step.last
            continue
        if isinstance(step, Problem):
            rest, searched, goes_on = "", 0, False
            while waiting and waiting[-1][1] is None:
                waiting.pop()
        yield step
    yield from _encoded(waiting, encoder)


def _encoded(waiting: Waiting, encoder: Encoder) -> Iterator[Encoded | Problem]:
    """Encode what waits."""
    if not waiting:
        return
    documents = [text for _, text in waiting if text]
    try:
        tokens, sizes = encoder.encode_pieces([part for part, _ in waiting])
    except ValueError as error:
        # A text that comes in several pieces is cut small enough for the tokenizer.
        if not documents:
            raise
        if len(documents) == 1 and waiting[-1][1]:
            yield Problem(documents[0].item, "cannot be encoded", f"the tokenizer gave up: {error}")
            return
        start = 0
        for stop, (_, text) in enumerate(waiting, 1):
            if text or stop == len(waiting):
                yield from _encoded(waiting[start:stop], encoder)
                start = stop
        return
    stops = np.cumsum(sizes)[[text is not None for _, text in waiting]]
    tokens = np.insert(tokens, stops, end_of_document(encoder.encoding))
    yield Encoded(tokens, documents, stops + np.arange(1, len(stops) + 1))

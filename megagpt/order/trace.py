"""The documents that a step trains on, from the run file alone (L1).

    megagpt data batch launch/runs/quickstart.toml --step 12

Nothing of a run is needed: the schedule says which samples step S takes, the data order says which
windows they are, and the index of the shards says which documents lie in a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megagpt.corpus.shards import read_index
from megagpt.errors import DamageError

if TYPE_CHECKING:
    from megagpt.order.loader import TokenLoader
    from megagpt.order.windows import TokenWindows


class Span(NamedTuple):
    """The part of one document that lies in one window."""

    document: int
    """Number of the document in its source, from 0."""
    offset: int
    """Tokens of the document that come before the window."""
    start: int
    """Where in the window it begins, in tokens."""
    tokens: int
    """Tokens of the document in the window, its END-OF-DOCUMENT included."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample and what is in it."""

    number: int
    """From 0 at the start of the run."""
    source: Path
    """Folder of the corpus."""
    epoch: int
    """Times that the source was read to its end before."""
    window: int
    """Number of the window in the source."""
    tokens: np.ndarray
    """(n_ctx + 1,) of the corpus's dtype. The first is only read, the last is only predicted."""
    scored: np.ndarray
    """bool (n_ctx + 1,): whether it counts as a target; the first is none."""
    spans: tuple[Span, ...]


def trace(loader: TokenLoader, first: int, count: int) -> Iterator[Sample]:
    """The samples first ... first + count - 1 with their documents.

    Raises DamageError for a shard or index that is not what the manifest says.
    """
    n_ctx = loader.n_ctx
    places = loader.places(first, count)
    rows = zip(places.source.tolist(), places.draw.tolist(), places.window.tolist(), strict=True)
    for number, (source, draw, window) in enumerate(rows, first):
        store = loader.stores[source]
        yield Sample(
            number=number,
            source=store.folder,
            epoch=draw // store.n_windows(n_ctx),
            window=window,
            tokens=loader.as_trained(store.window(window, n_ctx)[None], np.array([number]))[0],
            scored=np.append(False, store.scored(np.array([window]), n_ctx)[0]),
            spans=tuple(spans(store, store.begin(window, n_ctx), n_ctx + 1)),
        )


def spans(store: TokenWindows, first: int, count: int) -> Iterator[Span]:
    """The documents of tokens first ... first + count - 1 of a corpus.

    Binary search in the memory-mapped index: the cost does not grow with the corpus. Raises
    DamageError for an index that does not fit its shard.
    """
    shards = store.manifest.shards
    number = int(np.searchsorted(store.ends, first, side="right"))
    at, stop = first, first + count
    while at < stop:
        shard_end = int(store.ends[number])
        shard_first = shard_end - shards[number].tokens
        before = sum(shard.documents for shard in shards[:number])
        here = range(at - shard_first, min(stop, shard_end) - shard_first)
        for document, begin, end in _documents(store, number, here):
            start, last = max(begin, here.start), min(end, here.stop)
            yield Span(before + document, start - begin, shard_first + start - first, last - start)
        at = shard_first + here.stop
        number += 1


def _documents(store: TokenWindows, number: int, here: range) -> Iterator[tuple[int, int, int]]:
    """(number, first token, end) of the documents of a shard that hold tokens of `here`."""
    shard = store.manifest.shards[number]
    path = store.manifest.index_path(shard)
    index = read_index(path)
    # A document is one sequence in our own shards, and may be several in imported ones.
    sequence = np.searchsorted(index.pointers, here.start * store.dtype.itemsize, "right") - 1
    document = int(np.searchsorted(index.documents, sequence, "right")) - 1
    end = here.start
    while end < here.stop:
        if not 0 <= document < len(index.documents) - 1:
            raise DamageError(
                f"{path}: tells of no document at token {end} of its shard, which has "
                f"{shard.tokens}; run `megagpt data verify {store.folder}`"
            )
        first, last = (int(s) for s in index.documents[document : document + 2])
        begin = int(index.pointers[first]) // store.dtype.itemsize
        end = shard.tokens
        if last < len(index.pointers):
            end = int(index.pointers[last]) // store.dtype.itemsize
        if end > max(begin, here.start):
            yield document, begin, end
        document += 1

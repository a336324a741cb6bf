"""What may be removed from a corpus on request: duplicates, near-duplicates, evaluation text.

- Exact duplicates: a 64-bit hash of the text; the first document stays. With 10^9 documents the
  chance that one document is dropped wrongly is about 3%.
- Near-duplicates: MinHash over 5-word shingles and LSH (datasketch); a document whose estimated
  Jaccard similarity with an earlier one that stayed reaches the threshold goes. GPT-3 did the same
  on Spark with 10 hashes (Brown et al. 2020, appendix A).
- Evaluation text: 13-gram overlaps as in appendix C of the same paper: words are lower case,
  without punctuation; a shared 13-gram goes together with 200 characters on either side; pieces
  below 200 characters go, and documents that fall into more than 10 pieces go whole. The paper
  also spares 13-grams that occur in more than 10 training documents, which needs a pass over the
  whole corpus first; that is not done here, so a little more is removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megagpt.data.source import UNIT_BYTES, find_sources, plan_units
from megagpt.data.unit import LargeText, unit_items
from megagpt.errors import UsageError

GRAM = 13
WINDOW = 200
PIECES = 10
SHINGLE = 5
SCHEME: Literal["affine32"] = "affine32"
"""datasketch's family of hash functions with 32-bit values."""
_WORD = re.compile(r"\w+")


def text_hash(content: bytes) -> int:
    """64 bits of a document's UTF-8 text; decides its split and finds its copies."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


class Seen:
    """A set of 64-bit hashes in 8 bytes each: sorted runs that are merged as they grow."""

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []

    def first(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """(n,) whether each hash is new, in order; all are known afterwards."""
        new = np.zeros(len(hashes), bool)
        unique, places = np.unique(hashes, return_index=True)
        fresh = np.ones(len(unique), bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            fresh &= run[at] != unique
        new[places[fresh]] = True
        self._insert(unique[fresh])
        return new

    def _insert(self, run: npt.NDArray[np.uint64]) -> None:
        if not len(run):
            return
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate((self._runs.pop(), run)), kind="stable")
        self._runs.append(run)


def signature(text: str, hashes: int) -> npt.NDArray[np.uint32]:
    """(hashes,) MinHash over the 5-word shingles of a document."""
    from datasketch import MinHash

    words = text.lower().split()
    count = max(len(words) - SHINGLE + 1, 1)
    shingles = {" ".join(words[place : place + SHINGLE]) for place in range(count)}
    sketch = MinHash(num_perm=hashes, scheme=SCHEME, hashfunc=_shingle_hash)
    sketch.update_batch(sorted(shingles))
    return np.asarray(sketch.hashvalues, np.uint32)


def _shingle_hash(shingle: str) -> int:
    content = shingle.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(content, digest_size=4).digest(), "little")


class Similar:
    """Which documents are near-copies of an earlier one that stayed."""

    def __init__(self, threshold: float, hashes: int) -> None:
        from datasketch import MinHashLSH

        self._threshold, self._hashes = threshold, hashes
        self._index = MinHashLSH(threshold=threshold, num_perm=hashes)
        self._kept: list[npt.NDArray[np.uint32]] = []

    def first(self, signatures: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """(n,) whether each document stays, in order; `signatures` is (n, hashes)."""
        return np.array([self._add(row) for row in signatures], bool)

    def _add(self, row: npt.NDArray[np.uint32]) -> bool:
        from datasketch import MinHash

        sketch = MinHash(num_perm=self._hashes, scheme=SCHEME, hashvalues=row)
        for place in self._index.query(sketch):
            if np.mean(self._kept[place] == row) >= self._threshold:
                return False
        self._index.insert(len(self._kept), sketch)
        self._kept.append(row)
        return True


def evaluation_grams(paths: Sequence[str], text_field: str) -> frozenset[int]:
    """Hashes of all 13-grams in evaluation files (any input format).

    Raises UsageError when the files hold no 13-gram at all.
    """
    grams: set[int] = set()
    for text in evaluation_texts(paths, text_field):
        words = [match.group() for match in _WORD.finditer(text.lower())]
        grams.update(_gram(words, place) for place in range(len(words) - GRAM + 1))
    if not grams:
        raise UsageError(
            f"decontamination files {', '.join(paths)}: no text of {GRAM} words in them; give "
            "text files or JSON lines with the text field"
        )
    return frozenset(grams)


def evaluation_texts(paths: Sequence[str], text_field: str) -> Iterator[str]:
    """The documents of evaluation files, damaged ones left out."""
    for unit in plan_units(find_sources([Path(path) for path in paths]).sources, UNIT_BYTES):
        for item in unit_items(unit, text_field):
            if isinstance(item, LargeText):
                yield "".join(item.pieces())
            elif isinstance(item, str):
                yield item


def _gram(words: list[Any], place: int) -> int:
    content = " ".join(words[place : place + GRAM]).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def clean_pieces(text: str, grams: frozenset[int]) -> list[str]:
    """What stays of a document: itself, some pieces, or nothing."""
    lower = text.lower()
    if len(lower) != len(text):  # a few capitals grow in lower case; offsets would not fit
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    matches = list(_WORD.finditer(lower))
    words = [match.group() for match in matches]
    spans = (
        (matches[place].start(), matches[place + GRAM - 1].end())
        for place in range(len(words) - GRAM + 1)
        if _gram(words, place) in grams
    )
    pieces, start = [], 0
    for first, last in _merged(spans):
        pieces.append(text[start:first])
        start = last
    if not pieces:
        return [text]
    pieces.append(text[start:])
    kept = [piece for piece in pieces if len(piece) >= WINDOW]
    return kept if len(pieces) <= PIECES else []


def _merged(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans with their windows, overlapping ones joined."""
    first, last = -1, -1
    for start, end in spans:
        start, end = max(start - WINDOW, 0), end + WINDOW
        if last < 0:
            first, last = start, end
        elif start <= last:
            last = max(last, end)
        else:
            yield first, last
            first, last = start, end
    if last >= 0:
        yield first, last

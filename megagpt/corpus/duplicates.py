"""Copies and near-copies of documents, and the hashes of texts and words that find them (numpy).

- Exact duplicates: a 64-bit hash of the text; the first document stays. With 10^9 documents the
  chance that one document is dropped wrongly is about 3%.
- Near-duplicates: MinHash over 5-word shingles and LSH (datasketch). Of the documents that have the
  given Jaccard similarity with an earlier one that stayed, at least 95% go, and more of those that
  are nearer: `Bands` is chosen for that. GPT-3 (Brown et al. 2020, appendix A) used single words
  and Spark's ten tables of one hash, which finds more and drops much that is less alike.

Hashes are the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
SHINGLE = 5
SCHEME: Literal["affine32"] = "affine32"
"""datasketch's family of hash functions with 32-bit values."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""An odd number that spreads bits: 2^64 over the golden ratio."""
NO_BAND = 0.01
"""Chance that a pair of the given similarity has no band in common."""
FEW = 1.75
"""Standard deviations below the mean that 4% of such pairs have fewer equal hashes than."""
_REMEMBERED = 1 << 16
_LONG_WORD = 40


def text_hash(content: bytes) -> int:
    """64 bits of a document's UTF-8 text; decides its split and finds its copies."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


class _Codes(dict[str, int]):
    """A hash of each word; those of the latest short words are remembered."""

    def __missing__(self, word: str) -> int:
        code = text_hash(word.encode("utf-8", "surrogatepass"))
        if len(word) < _LONG_WORD:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[word] = code
        return code


_CODES = _Codes()


def word_hashes(words: Sequence[str]) -> Hashes:
    """(n,) a hash of each word."""
    return np.fromiter(map(_CODES.__getitem__, words), np.uint64, len(words))


def row_hashes(words: Hashes, size: int) -> Hashes:
    """(max(n - size + 1, 0),) a hash of each `size` words in a row: a polynomial in theirs."""
    count = max(len(words) - size + 1, 0)
    rows = np.zeros(count, np.uint64)
    for place in range(size):
        rows = rows * MULTIPLIER + words[place : place + count]
    return rows


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


class Duplicates:
    """Decides, part by part in the order of the input, which documents stay."""

    def __init__(self, exact: bool, similarity: float, hashes: int) -> None:
        """`similarity` is the Jaccard similarity of which 95% of near-copies are found, 0 keeps
        all; `hashes` those of a signature."""
        self._seen = Seen() if exact else None
        self._similar = Similar(bands_for(similarity, hashes)) if similarity else None

    def keep(
        self, hashes: Hashes, signatures: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.bool_], dict[str, int]]:
        """((documents,) whether each stays, how many go by reason)."""
        keep = np.ones(len(hashes), bool)
        gone: dict[str, int] = {}
        if self._seen is not None:
            keep = self._seen.first(hashes)
            gone["duplicate"] = int(np.count_nonzero(~keep))
        if self._similar is not None:
            stay = self._similar.first(signatures[keep])
            gone["near-duplicate"] = int(np.count_nonzero(~stay))
            keep[np.flatnonzero(keep)[~stay]] = False
        return keep, {reason: count for reason, count in gone.items() if count}


@lru_cache(maxsize=1)
def _permutations(hashes: int) -> Any:
    """datasketch's, which it would draw again for each document."""
    from datasketch import MinHash

    return MinHash(num_perm=hashes, scheme=SCHEME).permutations


def signature(text: str, hashes: int) -> npt.NDArray[np.uint32]:
    """(hashes,) MinHash over the 5-word shingles of a document."""
    from datasketch import MinHash

    words = word_hashes(text.lower().split())
    shingles = np.unique(row_hashes(words, min(len(words), SHINGLE)) >> np.uint64(32))
    sketch = MinHash(
        num_perm=hashes, scheme=SCHEME, hashfunc=int, permutations=_permutations(hashes)
    )
    sketch.update_batch(shingles)
    return np.asarray(sketch.hashvalues, np.uint32)


class Bands(NamedTuple):
    """How near-copies are told: they share all hashes of a band, and so many of all."""

    bands: int
    rows: int
    """Hashes of a band."""
    matches: int
    """Equal hashes from which two documents are near-copies."""


def bands_for(similarity: float, hashes: int) -> Bands:
    """What finds a pair of this Jaccard similarity with 95%.

    A hash of the two is equal with the probability `similarity`. No band of a pair may be shared in
    1% at most, and fewer than `matches` hashes in 4%: the estimate scatters around the similarity,
    and asking for the similarity itself would pass over half.
    """
    rows = max(
        (r for r in range(1, hashes + 1) if (1 - similarity**r) ** (hashes // r) <= NO_BAND),
        default=1,
    )
    spread = math.sqrt(hashes * similarity * (1 - similarity))
    return Bands(hashes // rows, rows, max(0, int(hashes * similarity - FEW * spread)))


class Similar:
    """Which documents are near-copies of an earlier one that stayed.

    datasketch's index of bands is spelled out here, for all bands of a batch at once, because one
    process has to keep up with all workers.
    """

    def __init__(self, bands: Bands) -> None:
        self._bands, self._rows, self._matches = bands
        self._index: dict[int, tuple[int, ...]] = {}
        """Band to the places of the documents that have it."""
        self._kept: list[npt.NDArray[np.uint32]] = []

    def first(self, signatures: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """(n,) whether each document stays, in order; `signatures` is (n, hashes)."""
        bands = self._band_hashes(signatures).tolist()
        rows = zip(signatures, bands, strict=True)
        return np.array([self._add(row, own) for row, own in rows], bool)

    def _band_hashes(self, signatures: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
        """(n, bands) a hash of each band's rows, other ones for the same rows in another band."""
        width = self._bands * self._rows
        shape = (len(signatures), self._bands, self._rows)
        parts = signatures[:, :width].reshape(shape).astype(np.uint64)
        result = np.arange(self._bands, dtype=np.uint64) * np.ones((len(parts), 1), np.uint64)
        for row in range(self._rows):
            result = (result ^ parts[:, :, row]) * MULTIPLIER
            result ^= result >> np.uint64(29)
        return result

    def _add(self, row: npt.NDArray[np.uint32], bands: list[int]) -> bool:
        for place in {place for band in bands for place in self._index.get(band, ())}:
            if np.count_nonzero(self._kept[place] == row) >= self._matches:
                return False
        # One tuple for all bands that no other document has, which are nearly all.
        own = (len(self._kept),)
        for band in bands:
            others = self._index.get(band)
            self._index[band] = (*others, *own) if others else own
        self._kept.append(row)
        return True

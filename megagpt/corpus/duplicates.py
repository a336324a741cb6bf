"""Copies and near-copies of documents, and the hashes of texts and words that find them (numpy).

- Exact duplicates: a 64-bit hash of the text; the first document stays. With 10^9 documents the
  chance that one document is dropped wrongly is about 3%.
- Near-duplicates: MinHash over 5-word shingles and LSH (datasketch); a document whose estimated
  Jaccard similarity with an earlier one that stayed reaches the threshold goes. GPT-3 did the same
  on Spark with 10 hashes (Brown et al. 2020, appendix A).

Hashes are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
SHINGLE = 5
SCHEME: Literal["affine32"] = "affine32"
"""datasketch's family of hash functions with 32-bit values."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""An odd number that spreads bits: 2^64 over the golden ratio."""
_REMEMBERED = 1 << 16
_LONG_WORD = 40


def text_hash(content: bytes) -> int:
    """64 bits of a document's UTF-8 text; decides its split and finds its copies."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


class _Codes(dict[str, int]):
    """A hash of each word; those of the latest short words are remembered."""

    def __missing__(self, word: str) -> int:
        content = word.encode("utf-8", "surrogatepass")
        code = int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
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
        """`similarity` is the Jaccard similarity from which a document is a near-copy, 0 keeps all;
        `hashes` those of a signature."""
        self._seen = Seen() if exact else None
        self._similar = Similar(similarity, hashes) if similarity else None

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


class Similar:
    """Which documents are near-copies of an earlier one that stayed.

    datasketch chooses the bands for the threshold; its index of them is spelled out here, for all
    bands of a batch at once, because one process has to keep up with all workers.
    """

    def __init__(self, threshold: float, hashes: int) -> None:
        from datasketch import MinHashLSH

        chosen = MinHashLSH(threshold=threshold, num_perm=hashes)
        self._threshold, self._bands, self._rows = threshold, chosen.b, chosen.r
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
            if np.mean(self._kept[place] == row) >= self._threshold:
                return False
        place = len(self._kept)
        for band in bands:
            self._index[band] = (*self._index.get(band, ()), place)
        self._kept.append(row)
        return True

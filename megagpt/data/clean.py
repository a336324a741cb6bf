"""Documents that may be removed from a corpus on request: copies and near-copies of others.

- Exact duplicates: a 64-bit hash of the text; the first document stays. With 10^9 documents the
  chance that one document is dropped wrongly is about 3%.
- Near-duplicates: MinHash over 5-word shingles and LSH (datasketch); a document whose estimated
  Jaccard similarity with an earlier one that stayed reaches the threshold goes. GPT-3 did the same
  on Spark with 10 hashes (Brown et al. 2020, appendix A).
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal

import numpy as np
import numpy.typing as npt

SHINGLE = 5
SCHEME: Literal["affine32"] = "affine32"
"""datasketch's family of hash functions with 32-bit values."""


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

"""Hashes of words and of rows of words, the same on every machine (numpy)."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""An odd number that spreads bits: 2^64 over the golden ratio."""
_REMEMBERED = 1 << 16
_LONG_WORD = 40


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

"""The order of windows: a keyed permutation, computed and never stored (L1, numpy).

A corpus of n windows is read in a new shuffled order each epoch, every window exactly once. The
order is a function of (seed, key of the corpus, epoch) alone: any draw is answered in O(1) time
and memory, so resuming is arithmetic and a corpus of 10^12 tokens starts at once.

How: a Feistel network permutes the 2^b numbers of the smallest b bits that hold n (Luby and
Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions"; here with
halves of b // 2 and b - b // 2 bits that take turns). A result outside [0, n) goes through the
network again until it falls inside (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary
finite domains"), fewer than two passes on average because 2^b < 2 n (but for a handful of windows).
"""

import hashlib
from collections.abc import Callable

import numpy as np

ROUNDS = 8
"""Feistel rounds: one 64-bit key each, all of one 64-byte digest."""

_MIN_BITS = 6
"""Smaller networks reach only some of the orders of their few windows, or not all equally."""

_TABLE_BITS = 10
"""Networks up to this size are tabulated first: few windows take many passes to fall inside."""

_PERSON = b"megagpt-order-1"
"""Names this order; another order would need another name, or runs would silently change."""

# Odd multipliers of splitmix64's finaliser (Steele, Lea and Flood 2014), good bit mixers.
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_FOLD = np.uint64(32)


class Permutation:
    """A bijection of [0, n) decided by (seed, key, epoch); n up to 2^62."""

    def __init__(self, n: int, seed: int, key: str, epoch: int = 0) -> None:
        assert 0 < n <= 1 << 62 and epoch >= 0, (n, epoch)
        self.n = n
        bits = max(_MIN_BITS, (n - 1).bit_length())
        self._high, self._low = bits // 2, bits - bits // 2
        name = f"{seed}/{key}/{epoch}/{n}".encode()
        digest = hashlib.blake2b(name, digest_size=8 * ROUNDS, person=_PERSON).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Images of `positions` (any integers of [0, n), shape (N,)) as int64, shape (N,)."""
        network: Callable[[np.ndarray], np.ndarray] = self._network
        if self._high + self._low <= _TABLE_BITS:
            table = network(np.arange(1 << self._high + self._low, dtype=np.uint64))
            network = table.take
        image = network(positions.astype(np.uint64))
        outside = np.flatnonzero(image >= self.n)
        while outside.size:
            image[outside] = network(image[outside])
            outside = outside[image[outside] >= self.n]
        return image.astype(np.int64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        """The Feistel rounds over all 2^b numbers; x: uint64 (N,)."""
        low_bits = np.uint64(self._low)
        high, low = x >> low_bits, x & np.uint64((1 << self._low) - 1)
        for i in range(0, ROUNDS, 2):
            high ^= _mix(low, self._keys[i], self._high)
            low ^= _mix(high, self._keys[i + 1], self._low)
        return (high << low_bits) | low


def _mix(x: np.ndarray, key: np.uint64, bits: int) -> np.ndarray:
    """A keyed pseudorandom function: uint64 (N,) to `bits` bits, the best mixed ones at the top."""
    v = x ^ key
    v *= _MULTIPLY_1
    v ^= v >> _FOLD
    v *= _MULTIPLY_2
    v >>= np.uint64(64 - bits)
    return v


def shuffle(draws: np.ndarray, n: int, seed: int, key: str) -> np.ndarray:
    """Windows behind the draws 0, 1, 2, ... of a corpus of n windows; both int64 (N,).

    Draw k is position k % n of epoch k // n, and each epoch has a permutation of its own: without
    replacement within an epoch (Brown et al. 2020, Appendix B).
    """
    epochs, positions = np.divmod(draws, n)
    windows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        windows[here] = Permutation(n, seed, key, int(epoch))(positions[here])
    return windows

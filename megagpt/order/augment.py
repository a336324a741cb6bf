"""Images as training sees them: mirrored and moved, by seed and sample number alone (L1, numpy).

What happens to a sample is a pure function of (seed, number of the sample), so that the number of
samples consumed stays the whole state of the data. Flips and shifts with a mirrored edge are those
of Image GPT's fine-tuning on CIFAR; on ids they are a choice of pixels.

Letters: N samples, S pixels a side.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from megagpt.errors import UsageError

_PERSON = b"megagpt-images-1"
"""Names these draws; others would need another name, or runs would silently change."""


@dataclass(frozen=True, slots=True)
class Augment:
    """What is drawn for each sample."""

    flip: bool = False
    """Mirror half of them left to right."""
    shift: int = 0
    """Move each by up to so many pixels in both directions."""

    def __bool__(self) -> bool:
        return self.flip or self.shift > 0

    def side(self, n_ctx: int) -> int:
        """S of images of n_ctx pixels. Raises UsageError for none, and a shift that is no part."""
        side = isqrt(n_ctx)
        if side * side != n_ctx or self.shift >= side:
            raise UsageError(
                f"data.shift = {self.shift}: model.n_ctx = {n_ctx} pixels must be a square of a "
                "longer side"
            )
        return side

    def draw(self, seed: int, number: int) -> tuple[bool, int, int]:
        """(whether sample `number` is mirrored, pixels right, pixels down)."""
        named = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8, person=_PERSON).digest()
        flipped, right, down = named[0] & 1, named[1:4], named[4:]
        reach = 2 * self.shift + 1
        moves = [int.from_bytes(part, "little") % reach - self.shift for part in (right, down)]
        return self.flip and bool(flipped), moves[0], moves[1]

    def apply(self, rows: NDArray, seed: int, numbers: Sequence[int]) -> NDArray:
        """Records (N, 1 + S * S), the start vector first, as training reads samples `numbers`."""
        side = self.side(rows.shape[1] - 1)
        pixels = np.empty((len(rows), side, side), np.int64)
        for place, number in enumerate(numbers):
            flipped, right, down = self.draw(seed, int(number))
            columns = _mirrored(np.arange(side) - right, side)
            lines = _mirrored(np.arange(side) - down, side)
            columns = columns[::-1] if flipped else columns
            pixels[place] = lines[:, None] * side + columns
        chosen = np.take_along_axis(rows[:, 1:], pixels.reshape(len(rows), -1), 1)
        return np.concatenate([rows[:, :1], chosen], 1)


def _mirrored(places: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """Places beyond an edge, mirrored at its pixel."""
    places = np.abs(places)
    return np.where(places >= side, 2 * (side - 1) - places, places)

"""A palette: the colours that ids of images stand for, as a tokenizer's words stand for text (L1).

Image GPT reads an image as one id for each pixel: the nearest of 512 colours or fewer, which
k-means has found among the pixels (Chen et al. 2020, section 3.1). Colours are those of OpenAI's
code: channels in [-1, 1], x / 127.5 - 1 of a byte x. The file lies where a tokenizer's would:

    tokenizer.json: {"type": "palette", "colours": [[r, g, b], ...]}

Letters: N images, S pixels a side, K colours.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megagpt.errors import DamageError, UsageError

MOST = 512
"""Colours at most, as in the paper."""
TYPE = "palette"
_HEAD = b'{"type": "palette"'
_LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue, as in ITU-R BT.601."""


@dataclass(frozen=True, eq=False)
class Palette:
    """Colours by id."""

    colours: NDArray[np.float32]
    """(K, 3): red, green, blue, each -1 to 1."""

    def __post_init__(self) -> None:
        """Raises UsageError for what is no palette."""
        shape = self.colours.shape
        if len(shape) != 2 or shape[1] != 3 or not 1 <= shape[0] <= MOST:
            raise UsageError(f"palette of shape {shape}: must be 1 to {MOST} colours of 3 channels")
        if not (np.abs(self.colours) <= 1).all():
            raise UsageError("palette: a channel is outside -1 to 1, which stand for 0 and 255")

    @property
    def size(self) -> int:
        """Colours; the id of the start vector stands behind them."""
        return len(self.colours)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the colours in their order: all that decides the ids."""
        content = self.colours.astype("<f4").tobytes()
        return hashlib.sha256(TYPE.encode() + b"\n" + content).hexdigest()

    @property
    def text(self) -> str:
        """The file, which reads back as the same numbers."""
        colours = [[float(x) for x in colour] for colour in self.colours]
        return json.dumps({"type": TYPE, "colours": colours}) + "\n"

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Ids (N, S * S) of images (N, S, S, 3) in raster order: the nearest colour of each pixel,
        of equally near ones the first."""
        pixels = images.reshape(-1, 3).astype(np.int64)
        packed = pixels[:, 0] << 16 | pixels[:, 1] << 8 | pixels[:, 2]
        # Each colour once: images have fewer of them than pixels.
        unique, which = np.unique(packed, return_inverse=True)
        each = np.stack([unique >> 16, unique >> 8 & 255, unique & 255], 1) / 127.5 - 1
        colours = self.colours.astype(np.float64)
        nearest = [
            ((part[:, None] - colours) ** 2).sum(-1).argmin(1)
            for part in np.array_split(each, len(each) // 4096 + 1)
        ]
        return np.concatenate(nearest)[which.reshape(-1)].reshape(len(images), -1)

    def decode(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images (N, S, S, 3) of ids (N, S * S), square: rint(127.5 (c + 1)) of each channel."""
        side = int(np.sqrt(ids.shape[1]))
        if side * side != ids.shape[1]:
            raise UsageError(f"{ids.shape[1]} pixels: an image is square")
        channels = np.rint(127.5 * (self.colours.astype(np.float64) + 1)).astype(np.uint8)
        return channels[ids].reshape(len(ids), side, side, 3)


def fit_palette(pixels: NDArray[np.uint8], colours: int, seed: int) -> Palette:
    """The palette of pixels (P, 3): their own colours where these are few, else the centres that
    k-means finds, the darkest first, so that ids do not hang on the order of the centres.

    Raises UsageError for too many colours, and where scikit-learn is missing.
    """
    if not 1 <= colours <= MOST:
        raise UsageError(f"{colours} colours: a palette has 1 to {MOST}")
    found = np.unique(pixels, axis=0) / 127.5 - 1
    if len(found) > colours:
        try:
            from sklearn.cluster import MiniBatchKMeans
        except ImportError:
            raise UsageError(
                "k-means needs scikit-learn: run `pip install scikit-learn`, or give a palette"
            ) from None
        means = MiniBatchKMeans(colours, random_state=seed, n_init=1, batch_size=8192)
        found = np.clip(means.fit(pixels / 127.5 - 1).cluster_centers_, -1, 1)
    order = np.lexsort((*found.T[::-1], found @ _LUMINANCE))
    return Palette(found[order].astype(np.float32))


def read_palette(path: Path | str, expected: str = "") -> Palette:
    """The palette in a tokenizer.json, or OpenAI's kmeans_centers.npy.

    `expected` is its fingerprint, "" where it is not known. Raises UsageError for a file that
    holds none, DamageError for one that cannot be read and for another than expected.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            colours = np.load(path, allow_pickle=False)
        else:
            colours = np.array(json.loads(path.read_text())["colours"])
        palette = Palette(colours.astype(np.float32))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except Exception as error:  # numpy reads the header as Python, which has many errors
        raise DamageError(
            f"{path}: not a palette ({type(error).__name__}: {error}); copy it again"
        ) from None
    if expected and palette.fingerprint != expected:
        raise DamageError(
            f"{path}: another palette than the images were made with (fingerprint "
            f"{palette.fingerprint[:12]}..., expected {expected[:12]}...); put the right one there"
        )
    return palette


def holds_palette(path: Path | str) -> bool:
    """Whether a file is a palette's."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_HEAD)) == _HEAD
    except OSError:
        return False

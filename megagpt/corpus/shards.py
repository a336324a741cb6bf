"""The two files of a shard: `.bin` with raw tokens, `.idx` with Megatron's index (stdlib, numpy).

`.bin` holds little-endian tokens, documents one after another, each with its END-OF-DOCUMENT; it
has no header. `.idx` is little-endian as well:

    9 bytes  magic `MMIDIDX\\0\\0`
    u64      version, 1
    u8       dtype code (1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16)
    u64      number of sequences S
    u64      number of document boundaries D (documents + 1)
    i32 * S  length of each sequence in tokens
    i64 * S  byte offset of each sequence in .bin
    i64 * D  the sequence at which each document starts, and S at the end
    i8 * S   modes, only in multimodal files

In our own shards a document is one sequence. Format: Megatron-LM,
megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.errors import DamageError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
BLOCK = 1 << 20
"""Bytes of one read while hashing: small enough to stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class Index:
    """What an .idx file says; the arrays are memory maps."""

    dtype: np.dtype
    sizes: npt.NDArray[np.int32]
    """(sequences,) tokens of each sequence, END-OF-DOCUMENT included."""
    pointers: npt.NDArray[np.int64]
    """(sequences,) byte offset of each sequence in .bin."""
    documents: npt.NDArray[np.int64]
    """(documents + 1,) the sequence at which each document starts, and the number of sequences."""


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 when every id fits, int32 otherwise."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<i4")


def read_index(path: Path) -> Index:
    """The index at `path`. Raises DamageError when the file is missing or not such an index."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise DamageError(
            f"{path}: cannot be read ({error.strerror}); prepare or copy the corpus again"
        ) from None
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DamageError(f"{path}: not a Megatron index (wrong magic); prepare the corpus again")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise DamageError(
            f"{path}: version {version}, dtype code {code}; only version 1 and codes 1 to 8 exist"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):
        raise DamageError(
            f"{path}: {size} bytes, but its header means {expected}: cut short or overwritten; "
            "prepare or copy the corpus again"
        )

    def array(dtype: str, count: int, offset: int) -> npt.NDArray:
        if count == 0:  # numpy cannot map nothing
            return np.zeros(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))

    start = HEADER.size
    return Index(
        dtype=DTYPES[code],
        sizes=array("<i4", sequences, start),
        pointers=array("<i8", sequences, start + 4 * sequences),
        documents=array("<i8", boundaries, start + 12 * sequences),
    )


def index_bytes(sizes: npt.NDArray[np.integer], dtype: np.dtype) -> bytes:
    """The content of an .idx file in which every document is one sequence of `sizes` tokens."""
    codes = {kind: code for code, kind in DTYPES.items()}
    ends = np.cumsum(sizes, dtype="<i8")
    # int64 before the multiplication: int32 offsets overflow at 2 GB.
    pointers = (ends - sizes) * np.int64(dtype.itemsize)
    head = HEADER.pack(MAGIC, 1, codes[np.dtype(dtype)], len(sizes), len(sizes) + 1)
    return b"".join(
        (
            head,
            np.asarray(sizes, "<i4").tobytes(),
            pointers.astype("<i8").tobytes(),
            np.arange(len(sizes) + 1, dtype="<i8").tobytes(),
        )
    )

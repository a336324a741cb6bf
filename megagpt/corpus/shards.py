"""The files of a shard: `.bin` with raw tokens, `.idx` with Megatron's index, and `.mask` where not
every token is a target (stdlib, numpy).

`.bin` holds little-endian tokens, documents one after another, each with the END-OF-DOCUMENT that
part.py puts behind it; it has no header. `.idx` is little-endian as well:

    9 bytes  magic `MMIDIDX\\0\\0`
    u64      version, 1
    u8       dtype code (1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16)
    u64      number of sequences S
    u64      number of document boundaries D (documents + 1)
    i32 * S  length of each sequence in tokens
    i64 * S  byte offset of each sequence in .bin
    i64 * D  the sequence at which each document starts, and S at the end
    i8 * S   modes, only in multimodal files

In our own shards a document is one sequence, and a record is one document. Format: Megatron-LM,
megatron/core/datasets/indexed_dataset.py.

`.mask` holds one byte for each token of .bin: 1 where it is scored as a target, 0 where it is only
read.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.errors import DamageError, UsageError
from megagpt.files import BLOCK, sync_folder, write_durably
from megagpt.tokenizer import token_dtype

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
SHARD_TOKENS = 100_000_000
"""Tokens of a shard unless told otherwise: 200 MB of uint16."""
LONGEST_DOCUMENT = 2**31 - 1
"""Tokens of one document: the index stores lengths as int32."""
SLICE = 1 << 23
"""Tokens written and hashed at a time."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One pair of files."""

    name: str
    tokens: int
    """Tokens in .bin, END-OF-DOCUMENT included."""
    documents: int
    bytes: int
    """Size of .bin."""
    sha256: str
    """Of .bin."""
    index_sha256: str
    """Of .idx."""
    mask_sha256: str = ""
    """Of .mask; "" where every token is a target."""


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

    @property
    def bounds(self) -> npt.NDArray[np.int64]:
        """(documents + 1,) the token at which each document starts, and the number of tokens."""
        ends = np.concatenate(([0], np.cumsum(self.sizes, dtype=np.int64)))
        return ends[np.asarray(self.documents, np.int64)]


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


def index_problem(index: Index, size: int) -> str:
    """What in an index contradicts itself or a .bin of `size` bytes; "" for nothing.

    Megatron writes the lengths twice, as lengths and as offsets, and each document's start.
    """
    sizes = np.asarray(index.sizes, np.int64)
    starts = np.asarray(index.documents)
    if not len(sizes) or len(starts) < 2:
        return "it lists no documents"
    if index.dtype.kind == "f":
        return f"its tokens are {index.dtype}, which no ids are"
    ends = np.cumsum(sizes) * index.dtype.itemsize
    wrong = np.flatnonzero((index.pointers != ends - sizes * index.dtype.itemsize) | (sizes < 0))
    if len(wrong):
        return f"its byte offsets do not follow from its lengths, first at sequence {int(wrong[0])}"
    if ends[-1] != size:
        return f"its lengths add up to {ends[-1]} bytes, its .bin has {size}"
    steps = np.diff(starts)
    if starts[0] != 0 or starts[-1] != len(sizes):
        return "its document starts do not cover its sequences"
    if steps.min() < 0:
        return f"document {int(np.argmin(steps)) + 1} starts before the one in front of it"
    if steps.min() == 0 and steps.max() > 1:
        return f"document {int(np.argmin(steps))} has no sequence, though others have several"
    return ""


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


class ShardWriter:
    """Writes the shards `NAME_00000`, `NAME_00001`, ... of one folder.

    A run that was killed goes on like this: give the shards that it had completed as `finished`,
    call `skip` with the sizes of all documents that it had flushed, then `add` as usual. The open
    shard is cut back to where `skip` ended, so what was written after the last flush is dropped.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        *,
        name: str | None = None,
        shard_tokens: int = SHARD_TOKENS,
        finished: Sequence[Shard] = (),
    ) -> None:
        if shard_tokens < 1:
            raise UsageError(f"shard size {shard_tokens}: must be at least 1 token")
        self.folder = folder
        self.dtype = token_dtype(vocab_size)
        self.shards: list[Shard] = []
        self._name = name or folder.resolve().name
        self._shard_tokens = shard_tokens
        self._finished = list(finished)
        self._sizes: list[npt.NDArray[np.int64]] = []
        self._tokens = 0
        self._files: dict[str, _Growing] = {}
        """Of the open shard, by ending; without one where all of it was skipped so far."""

    def add(
        self,
        tokens: npt.NDArray,
        sizes: npt.NDArray[np.integer],
        mask: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Append documents: `tokens` (sum(sizes),) of any integer dtype, each document with its
        END-OF-DOCUMENT; or records. `mask` (sum(sizes),): 1 for a target, with every call or with
        none. Raises UsageError for a document that the index cannot describe."""
        assert len(tokens) == int(np.sum(sizes, dtype=np.int64))
        assert mask is None or len(mask) == len(tokens)
        if len(sizes) and int(np.max(sizes)) > LONGEST_DOCUMENT:
            raise UsageError(
                f"a document of {int(np.max(sizes))} tokens: the index holds at most "
                f"{LONGEST_DOCUMENT}; split the document"
            )
        self._fill({".bin": tokens} if mask is None else {".bin": tokens, ".mask": mask}, sizes)

    def skip(self, sizes: npt.NDArray[np.integer]) -> None:
        """Count documents that an earlier run has written already."""
        assert not self._files
        self._fill({}, sizes)

    def flush(self) -> None:
        """Put all that was added on the disk, so that another run may `skip` it."""
        for file in self._files.values():
            file.flush()

    def close(self) -> list[Shard]:
        """Complete the last shard; all shards in order."""
        if self._tokens:
            self._close_shard()
        return self.shards

    def _fill(self, values: dict[str, npt.NDArray], sizes: npt.NDArray[np.integer]) -> None:
        """Append documents of `sizes`; `values` by the ending of the file that they go to."""
        ends = np.cumsum(sizes, dtype=np.int64)
        first, done = 0, 0
        while first < len(sizes):
            room = self._shard_tokens - self._tokens
            last = int(np.searchsorted(ends, done + room, side="right"))
            if last <= first:  # below it after a document longer than a shard
                if self._tokens:
                    self._close_shard()
                    continue
                last = first + 1  # longer than a shard: alone in one
            end = int(ends[last - 1])
            for ending, row in values.items():
                self._file(ending).write(row[done:end])
            self._sizes.append(np.asarray(sizes[first:last], np.int64))
            self._tokens += end - done
            first, done = last, end

    def _file(self, ending: str) -> _Growing:
        """A file of the open shard; opened, it is cut back to the tokens counted so far."""
        if ending not in self._files:
            dtype = self.dtype if ending == ".bin" else np.dtype(np.uint8)
            self._files[ending] = _Growing(self._path(ending), self._tokens, dtype)
        return self._files[ending]

    def _close_shard(self) -> None:
        sizes = np.concatenate(self._sizes)
        if len(self.shards) < len(self._finished):
            shard = self._finished[len(self.shards)]
            if (shard.tokens, shard.documents) != (self._tokens, len(sizes)):
                raise DamageError(
                    f"{self._path('.bin')}: an earlier run wrote {shard.documents} documents "
                    f"there, now there are {len(sizes)}; remove {self.folder} and start again"
                )
        else:
            shard = self._complete(sizes)
        self.shards.append(shard)
        self._sizes, self._tokens, self._files = [], 0, {}

    def _complete(self, sizes: npt.NDArray[np.int64]) -> Shard:
        tokens = self._file(".bin")
        self.flush()
        index = index_bytes(sizes, self.dtype)
        write_durably(self._path(".idx"), index)
        mask = self._files.get(".mask")
        for file in reversed(self._files.values()):  # the tokens last
            file.complete()
        sync_folder(self.folder)
        return Shard(
            name=self._path("").name,
            tokens=self._tokens,
            documents=len(sizes),
            bytes=self._tokens * self.dtype.itemsize,
            sha256=tokens.digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            mask_sha256=mask.digest.hexdigest() if mask else "",
        )

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self._name}_{len(self.shards):05d}{ending}"


class _Growing:
    """A file of the open shard, under a temporary name until it is complete, hashed as it grows."""

    def __init__(self, path: Path, count: int, dtype: np.dtype) -> None:
        """Opens it after its first `count` items. Raises DamageError when it is shorter."""
        self._path, self._temporary = path, path.with_name(path.name + ".tmp")
        self._dtype, size = dtype, count * dtype.itemsize
        self.digest = hashlib.sha256()
        if size == 0:
            self.file = self._temporary.open("wb", buffering=0)
            return
        if not self._temporary.exists() and path.exists():  # completed, then killed before a flush
            path.replace(self._temporary)
        if not self._temporary.exists() or self._temporary.stat().st_size < size:
            raise DamageError(
                f"{self._temporary}: shorter than the {size} bytes that an earlier run wrote; "
                f"remove {path.parent} and start again"
            )
        self.file = self._temporary.open("r+b", buffering=0)
        self.file.truncate(size)
        while block := self.file.read(BLOCK):
            self.digest.update(block)

    def write(self, values: npt.NDArray) -> None:
        """Append the values."""
        for start in range(0, len(values), SLICE):
            view = np.ascontiguousarray(values[start : start + SLICE], self._dtype).data.cast("B")
            self.digest.update(view)
            # A raw file may take less than it is given: a full disk shows in the next call.
            while view:
                view = view[self.file.write(view) :]

    def flush(self) -> None:
        """Put it on the disk."""
        os.fsync(self.file.fileno())

    def complete(self) -> None:
        """Give it its name."""
        self.file.close()
        self._temporary.replace(self._path)

"""Writes shards: documents in, `.bin` and `.idx` pairs out, each whole or absent.

A shard takes whole documents until the next one would exceed its size; a longer document has a
shard of its own. So the files depend on the documents and the shard size alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megagpt.corpus.manifest import Shard
from megagpt.corpus.shards import BLOCK, index_bytes, token_dtype
from megagpt.errors import DamageError, UsageError
from megagpt.files import sync_folder, write_durably

SHARD_TOKENS = 100_000_000
"""Tokens of a shard unless told otherwise: 200 MB of uint16."""
LONGEST_DOCUMENT = 2**31 - 1
"""Tokens of one document: the index stores lengths as int32."""
SLICE = 1 << 23
"""Tokens written and hashed at a time."""


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
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def add(self, tokens: npt.NDArray, sizes: npt.NDArray[np.integer]) -> None:
        """Append documents: `tokens` (sum(sizes),) of any integer dtype, each document with its
        END-OF-DOCUMENT. Raises UsageError for a document that the index cannot describe."""
        assert len(tokens) == int(np.sum(sizes, dtype=np.int64))
        if len(sizes) and int(np.max(sizes)) > LONGEST_DOCUMENT:
            raise UsageError(
                f"a document of {int(np.max(sizes))} tokens: the index holds at most "
                f"{LONGEST_DOCUMENT}; split the document"
            )
        self._fill(tokens, sizes)

    def skip(self, sizes: npt.NDArray[np.integer]) -> None:
        """Count documents that an earlier run has written already."""
        assert self._file is None
        self._fill(None, sizes)

    def flush(self) -> None:
        """Put all that was added on the disk, so that another run may `skip` it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> list[Shard]:
        """Complete the last shard; all shards in order."""
        if self._tokens:
            self._close_shard()
        return self.shards

    def _fill(self, tokens: npt.NDArray | None, sizes: npt.NDArray[np.integer]) -> None:
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
            if tokens is not None:
                self._write(tokens[done:end])
            self._sizes.append(np.asarray(sizes[first:last], np.int64))
            self._tokens += end - done
            first, done = last, end

    def _write(self, tokens: npt.NDArray) -> None:
        if self._file is None:
            self._file = self._open()
        for start in range(0, len(tokens), SLICE):
            part = np.ascontiguousarray(tokens[start : start + SLICE], self.dtype)
            view = part.data.cast("B")
            self._digest.update(view)
            # A raw file may take less than it is given: a full disk shows in the next call.
            while view:
                view = view[self._file.write(view) :]

    def _open(self) -> BinaryIO:
        """The file of the open shard, cut back to the tokens counted so far and hashed."""
        temporary, final = self._path(".bin.tmp"), self._path(".bin")
        if self._tokens == 0:
            return temporary.open("wb", buffering=0)
        if not temporary.exists() and final.exists():  # completed, then killed before a flush
            final.replace(temporary)
        size = self._tokens * self.dtype.itemsize
        if not temporary.exists() or temporary.stat().st_size < size:
            raise DamageError(
                f"{temporary}: shorter than the {size} bytes that an earlier run wrote; remove "
                f"{self.folder} and start again"
            )
        file = temporary.open("r+b", buffering=0)
        file.truncate(size)
        while block := file.read(BLOCK):
            self._digest.update(block)
        return file

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
        self._sizes, self._tokens, self._digest = [], 0, hashlib.sha256()

    def _complete(self, sizes: npt.NDArray[np.int64]) -> Shard:
        if self._file is None:  # all of it skipped
            self._file = self._open()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        index = index_bytes(sizes, self.dtype)
        write_durably(self._path(".idx"), index)
        self._path(".bin.tmp").replace(self._path(".bin"))
        sync_folder(self.folder)
        return Shard(
            name=self._path("").name,
            tokens=self._tokens,
            documents=len(sizes),
            bytes=self._tokens * self.dtype.itemsize,
            sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self._name}_{len(self.shards):05d}{ending}"

"""The tokens of one corpus as windows of n_ctx + 1, read where they lie (L1, numpy).

A corpus of records has one window for each: window i is record i, of n_ctx + 1 tokens. In a corpus
of packed documents the shards of a folder are one long row of tokens: documents one after another,
each followed by END-OF-DOCUMENT. Window i is the tokens [i * n_ctx, i * n_ctx + n_ctx + 1): its
last token is the first of window i + 1, and so each token is a target in one window only. Windows
run across the borders of documents and shards. The first token is no target; nor are the last ones,
fewer than n_ctx of them, that do not fill a window. A mask lies beside the tokens, one byte for
each, and tells which of them are scored where they are targets.

Opening reads the manifest, the sizes of the files and the tokenizer's file, nothing else. Tokens
are read with pread and not through a memory map: a map of a file that was cut short meanwhile
kills the process by SIGBUS without a message, and holds a file descriptor for every shard.
"""

import hashlib
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

import numpy as np

from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.verify import file_problem, tokenizer_problem
from megagpt.errors import DamageError, UsageError

MAX_OPEN = 128
"""Files of one corpus that are open at a time; 1024 descriptors is a common limit of a process."""


class TokenWindows:
    """One corpus: a folder with a manifest. May be read from several threads."""

    def __init__(self, folder: Path, sizes: bool = True) -> None:
        """Raises what read_manifest raises, and DamageError for a shard of the wrong size or
        another tokenizer.json than the manifest's. sizes: False where others look at them."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.dtype = self.manifest.dtype
        shards = self.manifest.shards
        self.paths = [self.manifest.bin_path(shard) for shard in shards]
        self.masks = [self.manifest.mask_path(shard) for shard in shards if shard.mask_sha256]
        """The mask of each shard; [] where all targets are scored."""
        for shard in shards if sizes else ():
            for path, size, _ in self.manifest.files(shard):
                if size is not None and (problem := file_problem(path, size)):
                    raise DamageError(f"{problem}; prepare or copy it again")
        if problem := tokenizer_problem(self.manifest):
            raise DamageError(f"{problem}; copy the corpus again, its tokenizer.json included")
        self.ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        """Tokens of the corpus up to the end of each shard."""
        self._ends: list[int] = self.ends.tolist()
        self.n_tokens = self._ends[-1] if shards else 0
        digest = hashlib.sha256(self.dtype.name.encode())
        for shard in shards:
            digest.update(f" {shard.tokens} {shard.sha256}".encode())
            # Only what there is: the names of packed documents without a mask stay.
            if shard.mask_sha256:
                digest.update(f" mask {shard.mask_sha256}".encode())
        if self.manifest.record_length:
            digest.update(f" records {self.manifest.record_length}".encode())
        self.fingerprint = digest.hexdigest()
        """Names what the corpus holds, wherever it lies: the checksums of its shards."""
        self._files: OrderedDict[Path, int] = OrderedDict()
        """Descriptors of open files, the one opened first in front."""
        self._lock = threading.Lock()

    def n_windows(self, n_ctx: int) -> int:
        """Whole windows of n_ctx + 1 tokens. Raises UsageError when there is none, and for records
        of another length."""
        if length := self.manifest.record_length:
            if length != n_ctx + 1:
                raise UsageError(
                    f"{self.folder}: its records have {length} tokens, which need model.n_ctx = "
                    f"{length - 1}, not {n_ctx}: a record is one window of n_ctx + 1 tokens; set "
                    "model.n_ctx, or prepare records of another length"
                )
            return self.manifest.documents
        n = (self.n_tokens - 1) // n_ctx
        if n < 1:
            raise UsageError(
                f"{self.folder}: {self.n_tokens} tokens do not fill one window of n_ctx + 1 = "
                f"{n_ctx + 1} tokens; prepare a larger corpus or lower model.n_ctx"
            )
        return n

    def begin(self, window: int, n_ctx: int) -> int:
        """The first token of a window, by its number in the corpus."""
        return window * (self.manifest.record_length or n_ctx)

    def window(self, i: int, n_ctx: int) -> np.ndarray:
        """Window i: (n_ctx + 1,) of the corpus's dtype."""
        return self.windows(np.array([i]), n_ctx)[0]

    def windows(self, indices: np.ndarray, n_ctx: int) -> np.ndarray:
        """Windows by number: (N, n_ctx + 1) of the corpus's dtype, uint16 or int32.

        Raises DamageError for a shard that ends too early or holds a token outside the vocabulary.
        """
        rows = np.empty((len(indices), n_ctx + 1), self.dtype)
        self._fill(rows, indices, self.paths)
        # As unsigned numbers, negative ids of an int32 corpus are too large as well.
        unsigned = rows.view(f"<u{rows.itemsize}")
        if unsigned.size and int(unsigned.max()) >= self.manifest.ids:
            row, column = divmod(int(unsigned.argmax()), n_ctx + 1)
            raise DamageError(
                f"{self.folder}: token number {self.begin(int(indices[row]), n_ctx) + column} is "
                f"{int(rows[row, column])}, outside the vocabulary of {self.manifest.ids}; "
                f"run `megagpt data verify {self.folder}` to see what is damaged"
            )
        return rows

    def scored(self, indices: np.ndarray, n_ctx: int) -> np.ndarray:
        """Which targets of windows count: bool (N, n_ctx), the target of input j in column j.

        Raises DamageError for a mask that ends too early or holds another byte than 0 and 1.
        """
        rows = np.ones((len(indices), n_ctx + 1), np.uint8)
        if self.masks:
            self._fill(rows, indices, self.masks)
            if rows.size and int(rows.max()) > 1:
                raise DamageError(
                    f"{self.folder}: a mask holds the byte {int(rows.max())}, which is neither 0 "
                    f"nor 1; run `megagpt data verify {self.folder}` to see what is damaged"
                )
        return rows[:, 1:].astype(bool)

    def _fill(self, rows: np.ndarray, indices: np.ndarray, paths: list[Path]) -> None:
        """Fill rows (N, n_ctx + 1) with what files of one item for each token hold of windows."""
        buffer = rows.reshape(-1).view(np.uint8).data
        row_bytes = rows.itemsize * rows.shape[1]
        with self._lock:
            for row, index in enumerate(indices.tolist()):
                part = buffer[row * row_bytes : (row + 1) * row_bytes]
                self._read(self.begin(index, rows.shape[1] - 1), part, paths, rows.itemsize)

    def _read(self, token: int, out: memoryview, paths: list[Path], size: int) -> None:
        """Fill `out` (bytes) from token number `token` on, through as many shards as it takes;
        `paths` are their files of `size` bytes a token."""
        assert 0 <= token and token + len(out) // size <= self.n_tokens, (token, len(out))
        shard = bisect_right(self._ends, token)
        done = 0
        while done < len(out):
            tokens = self.manifest.shards[shard].tokens
            offset = token + done // size - (self._ends[shard] - tokens)
            part = out[done : done + (tokens - offset) * size]
            if part:
                self._read_file(paths[shard], offset * size, part)
            done += len(part)
            shard += 1

    def _read_file(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of one file from `offset` on."""
        if path not in self._files:
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            self._files[path] = os.open(path, os.O_RDONLY)
        done = 0
        while done < len(out):
            size = os.preadv(self._files[path], [out[done:]], offset + done)
            if size == 0:
                raise DamageError(
                    f"{path}: ends at byte {offset + done}, before its end as the manifest tells "
                    "it; it was cut short after it was opened. Prepare or copy it again"
                )
            done += size

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

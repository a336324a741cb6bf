"""Documents to ids at full speed, always the ids of tiktoken's `encode_ordinary`.

Backends: `tiktoken` is the reference. `fastokens` is some twenty times faster; it is used only
after it has given tiktoken's ids on a set of hard strings, and every 200th piece of text is
encoded with both while it runs. `bytes` copies.

tiktoken gives up on a run of about a million white-space characters. GPT-2's pattern never joins
text across a white-space character that starts or ends such a run, so long texts are cut there:
the ids stay the same, and memory is bounded by the pieces. With another pattern they are cut where
encoding the text on both sides shows that nothing is joined.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megagpt.errors import DamageError, UsageError
from megagpt.tokenizer import token_dtype
from megagpt.tokenizer.gpt2 import GPT2_PATTERN
from megagpt.tokenizer.json import encoding_merges, tokenizer_json
from megagpt.tokenizer.proof import HARD

if TYPE_CHECKING:
    import tiktoken

FastEncoder = Callable[[list[str]], tuple[bytes, bytes]]
"""Texts to (ids as uint32, offsets as uint64) in one buffer each."""
BACKENDS = ("auto", "fastokens", "tiktoken")
PIECE = 1 << 18
"""Characters after which a long text is cut at the next safe place."""
MARGIN = 1 << 10
"""Characters on each side of a cut whose ids must show that it is safe."""
SHIFTS = (0, 1, 2, 3, 5, 7)
"""By how much the left side begins earlier, so that no group of up to eight characters passes."""
TRIES = 32
"""Places in so many characters as a piece has that are tried."""
SAMPLE = 200
"""One piece in so many is encoded with tiktoken as well."""

# Unicode White_Space, what \s means to tiktoken; str.isspace would add U+001C to U+001F.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CUT = re.compile(f"(?<=[^{_SPACE}])[{_SPACE}]|[{_SPACE}](?=[^{_SPACE}])")
_EDGE = re.compile(f"(?<=[^{_SPACE}])[{_SPACE}]|(?<=[{_SPACE}])[^{_SPACE}]")
"""Where white space begins or ends."""


def pieces(text: str, encoding: tiktoken.Encoding, searched: int = 0) -> Iterator[str]:
    """`text` in pieces of about PIECE characters that encode to the same ids one by one.

    `searched`: characters in which an earlier call has found no place to cut. The last piece may go
    on; it is not cut in its last MARGIN characters. Text without white space comes whole, but for
    the encoding `bytes`.
    """
    start = 0
    while len(text) - start > PIECE:
        cut = _safe_place(text, max(start + PIECE, searched), encoding)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


def _safe_place(text: str, place: int, encoding: tiktoken.Encoding) -> int | None:
    """The first known place from `place` on where cutting the text keeps the ids."""
    if encoding.name == "bytes":
        return place
    if encoding._pat_str == GPT2_PATTERN:
        found = _CUT.search(text, place)
        return found.start() if found else None
    last = len(text) - MARGIN
    while place < last:
        for found in islice(_EDGE.finditer(text, place, min(place + PIECE, last)), TRIES):
            if _is_proven(text, found.start(), encoding):
                return found.start()
        place += PIECE
    return None


def _is_proven(text: str, cut: int, encoding: tiktoken.Encoding) -> bool:
    """Whether the ids around `cut` are those of its two sides, wherever the left side begins: a
    pattern that counts characters, or looks back, gives others for one beginning or another."""
    right = text[cut : cut + MARGIN]
    ids = encoding.encode_ordinary(right)
    for shift in SHIFTS:
        left = text[max(cut - MARGIN - shift, 0) : cut]
        if encoding.encode_ordinary(left) + ids != encoding.encode_ordinary(left + right):
            return False
    return True


@lru_cache(maxsize=2)
def _fast_encoder(encoding: tiktoken.Encoding) -> FastEncoder | None:
    """fastokens with the same vocabulary, or None when its merges cannot be known (0.3 s)."""
    import fastokens

    merges = encoding_merges(encoding)
    if merges is None:
        return None
    return fastokens.Tokenizer.from_json_str(json.dumps(tokenizer_json(merges))).encode_batch_flat


class Encoder:
    """Encodes texts; megagpt.corpus.part ends each document with END-OF-DOCUMENT.

    `backend` is what is in use after construction; `note` says why it is not the fast one.
    Constructing starts no thread, so that a process may fork afterwards.
    """

    def __init__(self, encoding: tiktoken.Encoding, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise UsageError(f"backend {backend}: must be one of {', '.join(BACKENDS)}")
        self.encoding = encoding
        self.dtype = token_dtype(encoding.n_vocab)
        self.backend = "tiktoken"
        self.note = ""
        self._fast: FastEncoder | None = None
        self._count = 0
        self._bytes = np.zeros(encoding.n_vocab, np.int32)
        """(n_vocab,) bytes of text that each id stands for."""
        for word, rank in encoding._mergeable_ranks.items():
            self._bytes[rank] = len(word)
        if encoding.name == "bytes":
            self.backend = "bytes"
        elif backend != "tiktoken":
            self._load_fast(required=backend == "fastokens")

    def __reduce__(self) -> tuple[type[Encoder], tuple[tiktoken.Encoding, str]]:
        return Encoder, (self.encoding, "auto" if self._fast else "tiktoken")

    def check(self) -> None:
        """Compare the fast backend with tiktoken on hard strings; fall back when they differ."""
        if self._fast is None:
            return
        tokens, sizes = self._encode_fast(HARD)
        expected = [self._reference(text) for text in HARD]
        if [len(ids) for ids in expected] != list(sizes) or not np.array_equal(
            np.concatenate(expected), tokens
        ):
            self._fast = None
            self.backend = "tiktoken"
            self.note = "fastokens gave other ids than tiktoken in the self-check; using tiktoken"

    def encode_pieces(self, parts: list[str]) -> tuple[npt.NDArray, npt.NDArray[np.int64]]:
        """(tokens, sizes): the ids of all texts (one or more) in a row, and the number of ids of
        each.

        Texts must not hold lone surrogates; what `pieces` would cut may be too long for tiktoken.
        Raises ValueError for a text that tiktoken cannot split, DamageError when the fast backend
        differs from tiktoken, UsageError when the ids do not stand for all of the text.
        """
        if self.backend == "bytes":
            raw = [part.encode() for part in parts]
            tokens = np.frombuffer(b"".join(raw), np.uint8).astype(self.dtype)
            return tokens, np.array([len(part) for part in raw], np.int64)
        if self._fast is None:
            found = [self._reference(part) for part in parts]
            sizes = np.array([len(ids) for ids in found], np.int64)
            tokens = np.concatenate(found)
        else:
            tokens, sizes = self._encode_fast(parts)
            self._compare(parts, tokens, sizes)
        self._check_coverage(parts, tokens)
        return tokens.astype(self.dtype), sizes

    def _check_coverage(self, parts: list[str], tokens: npt.NDArray) -> None:
        """Bytes of the ids against bytes of the text: a pattern may pass over some of it."""
        size = sum(len(part) if part.isascii() else len(part.encode()) for part in parts)
        covered = int(self._bytes.take(tokens, mode="clip").sum(dtype=np.int64))
        if covered == size:
            return
        for part in parts if len(parts) > 1 else ():
            self._check_coverage([part], self._reference(part))
        raise UsageError(
            f"tokenizer {self.encoding.name}: its ids stand for {covered} of {size} bytes of "
            f"{parts[0][:60]!r}, so text would vanish; use a tokenizer that covers every text, for "
            "example one from data_prep/train_tokenizer.py"
        )

    def _reference(self, text: str) -> npt.NDArray[np.uint32]:
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def _encode_fast(self, parts: list[str]) -> tuple[npt.NDArray, npt.NDArray[np.int64]]:
        assert self._fast is not None
        ids, offsets = self._fast(parts)
        sizes = np.diff(np.frombuffer(offsets, np.uint64)).astype(np.int64)
        return np.frombuffer(ids, np.uint32), sizes

    def _compare(self, parts: list[str], tokens: npt.NDArray, sizes: npt.NDArray) -> None:
        """Encode every SAMPLE-th piece with tiktoken too."""
        first = -self._count % SAMPLE
        self._count += len(parts)
        if first >= len(parts):
            return
        ends = np.cumsum(sizes)
        for place in range(first, len(parts), SAMPLE):
            ids = tokens[ends[place] - sizes[place] : ends[place]]
            if not np.array_equal(ids, self._reference(parts[place])):
                raise DamageError(
                    f"fastokens gave other ids than tiktoken for the text {parts[place][:60]!r}; "
                    "remove the output and run again with --backend tiktoken"
                )

    def _load_fast(self, required: bool) -> None:
        # One thread for each worker process; the pool is as wide as the workers already.
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        try:
            self._fast = _fast_encoder(self.encoding)
        except ImportError:
            self.note = "fastokens is not installed; using tiktoken"
        else:
            if self._fast:
                self.backend = "fastokens"
            else:
                self.note = f"fastokens does not do {self.encoding.name}; using tiktoken"
        if required and self._fast is None:
            raise UsageError(f"backend fastokens: {self.note.split(';')[0]}; use --backend auto")

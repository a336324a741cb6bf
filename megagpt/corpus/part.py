"""The part that a worker makes of a unit: tokens in `N.bin`, what is known of them in `N.doc`.

    read (texts.py) -> clean -> encode -> write

clean decides the split by a hash of the text, cuts evaluation text out, and makes the signature for
the search of near-copies; long documents pass piece by piece unless a filter needs the whole text.
encode turns texts into tokens; nothing else ends a text with END-OF-DOCUMENT.

Both files are written to a temporary name, flushed and renamed, `.doc` last: a unit whose `.doc`
exists is done. `.doc` is a line of JSON and the raw arrays of `Part`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.corpus.contamination import clean_pieces
from megagpt.corpus.duplicates import Hashes, signature, text_hash
from megagpt.corpus.recipe import PrepareOptions
from megagpt.corpus.summary import SHOWN
from megagpt.corpus.texts import Item, Problem, join, read, utf8
from megagpt.corpus.unfinished import believed, payload_digest, unit_path
from megagpt.corpus.unit import Unit
from megagpt.files import whole_file, write_durably
from megagpt.tokenizer import END_OF_DOCUMENT, end_of_document
from megagpt.tokenizer.encoder import MARGIN, PIECE, Encoder, pieces

BATCH = 1 << 20
"""Characters that are encoded at a time: bounds a worker's memory."""
FIELDS = {"items": "<i8", "sizes": "<i8", "bytes": "<i8", "hashes": "<u8", "validation": "u1"}


@dataclass
class Part:
    """What `.doc` says; arrays have one entry for each document."""

    items: npt.NDArray[np.int64]
    """Number of the line, row or file within the unit, from 0."""
    sizes: npt.NDArray[np.int64]
    """Tokens, END-OF-DOCUMENT included."""
    bytes: npt.NDArray[np.int64]
    """UTF-8 bytes of the text."""
    hashes: npt.NDArray[np.uint64]
    validation: npt.NDArray[np.uint8]
    """1 for validation, 0 for train."""
    signatures: npt.NDArray[np.uint32]
    """(documents, hashes)."""
    n_items: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """Documents left out, by reason."""
    problems: list[list[Any]] = field(default_factory=list)
    """[item, reason, detail, path] of the first few of each reason."""
    notes: dict[str, int] = field(default_factory=dict)
    """Documents changed or remarkable."""
    digest: str = ""
    """Of the unit's payload, to know the same input after a restart."""


def read_part(path: Path) -> Part:
    """Read a `.doc` file. Raises DamageError."""
    line, _, raw = path.read_bytes().partition(b"\n")
    arrays: dict[str, Any] = {}
    offset = 0
    with believed(path):
        head = json.loads(line)
        count, hashes = head.pop("documents"), head.pop("minhashes")
        for name, kind in FIELDS.items():
            arrays[name] = np.frombuffer(raw, kind, count, offset)
            offset += arrays[name].nbytes
        signatures = np.frombuffer(raw, "<u4", count * hashes, offset).reshape(count, hashes)
        return Part(**arrays, signatures=signatures, **head)


class Text(NamedTuple):
    """Text to be encoded, and with the last piece of a document what is known of all of it."""

    item: int
    text: str
    last: bool
    bytes: int = 0
    """Of the document's UTF-8 text."""
    hash: int = 0
    validation: bool = False
    signature: npt.NDArray[np.uint32] | None = None


class PartMaker:
    """Makes the part of a unit, in a worker process; see megagpt.corpus.workers."""

    def __init__(
        self, folder: Path, options: PrepareOptions, grams: Hashes, encoder: Encoder
    ) -> None:
        """`grams`: 13-grams to remove, sorted."""
        self._folder, self.encoder, self._checked = folder, encoder, False
        self._text_field = options.text_field
        self._by_place, self._fraction = options.validation_by_place, options.validation_fraction
        self._hashed = options.deduplicate
        self._minhashes = options.hashes if options.near_duplicates else 0
        self._grams = grams

    def __call__(self, unit: Unit) -> str:
        """Write the part; why the encoder is not the fast one, if it is not.

        Raises OSError when the disk is full.
        """
        if not self._checked:
            self.encoder.check()
            self._checked = True
        self._notes: Counter[str] = Counter()
        items = read(unit, self._text_field)
        with whole_file(unit_path(self._folder, unit.number, "bin")) as file:
            writer = _PartWriter(file, self.encoder.dtype.itemsize)
            for step in encode(self._clean(items), self.encoder):
                writer.take(step)
            head = {"notes": self._notes, "digest": payload_digest(unit.payload)}
            document = writer.document(self._minhashes, head)
        write_durably(unit_path(self._folder, unit.number, "doc"), document)
        return self.encoder.note

    # --- clean ----------------------------------------------------------------------------------

    def _clean(self, items: Iterable[Item]) -> Iterator[Text | Problem]:
        """Apply the rules to every document; problems pass, and what came before them of the same
        document counts for nothing."""
        if not self._by_place:
            whole = len(self._grams) or self._minhashes
            yield from self._split(join(items) if whole else items, int(self._fraction * 2**64))
            return
        # Each text becomes one of train and, behind it, one of validation.
        for item in join(items):
            if isinstance(item, Problem):
                yield item
                continue
            number, text, _ = item
            cut = int(len(text) * (1 - self._fraction))
            for part, limit in ((text[:cut], 0), (text[cut:], 1 << 64)):
                yield from self._split([(number, part, True)] if part else [], limit)

    def _split(self, items: Iterable[Item], limit: int) -> Iterator[Text | Problem]:
        """The texts of documents, of which those with a hash below `limit` are validation's."""
        hashed = limit or self._hashed
        digest, length, literal = None, 0, False
        for item in items:
            if isinstance(item, Problem):
                digest, length, literal = None, 0, False
                yield item
                continue
            number, given, last = item
            text, content = utf8(given)
            if text is not given:
                self._notes["lone surrogates replaced by U+FFFD"] += 1
            if hashed:
                digest = digest or blake2b(digest_size=8)
                digest.update(content)
            length += len(content)
            literal |= END_OF_DOCUMENT in text
            if not last:
                yield Text(number, text, False)
                continue
            if literal:
                self._notes[f"the literal {END_OF_DOCUMENT} kept as text"] += 1
            code = int.from_bytes(digest.digest(), "little") if digest else 0
            if len(self._grams):
                yield from self._cut(number, text, code < limit)
            else:
                yield self._whole(number, text, length, code, code < limit)
            digest, length, literal = None, 0, False

    def _cut(self, item: int, text: str, validation: bool) -> Iterator[Text | Problem]:
        """What stays of a document without evaluation text: each piece is a document."""
        kept = clean_pieces(text, self._grams)
        if not kept:
            yield Problem(item, "evaluation text")
        elif kept[0] != text:
            self._notes["evaluation text cut out"] += 1
        for piece in kept:
            content = piece.encode()
            yield self._whole(item, piece, len(content), text_hash(content), validation)

    def _whole(self, item: int, text: str, size: int, code: int, validation: bool) -> Text:
        made = signature(text, self._minhashes) if self._minhashes else None
        return Text(item, text, True, size, code, validation, made)


# --- encode -------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Tokens of documents in a row; those behind the last end belong to one that goes on."""

    tokens: npt.NDArray
    documents: list[Text]
    """The last pieces of those that end in `tokens`."""
    ends: npt.NDArray[np.intp]
    """The place in `tokens` behind the END-OF-DOCUMENT of each."""


Waiting = list[tuple[str, Text | None]]
"""Pieces of text in a row, each with the document that it ends, if it does."""


def encode(steps: Iterable[Text | Problem], encoder: Encoder) -> Iterator[Encoded | Problem]:
    """Encode the texts, END-OF-DOCUMENT after each document; problems pass.

    A problem means that the tokens before it, behind the last end, are no document.
    """
    waiting: Waiting = []
    size = 0  # characters that wait
    rest = ""  # text behind the last safe cut: a token may join it with the next piece
    searched = 0  # characters of it in which there is no other
    goes_on = False  # whether the last text was a piece of a document that has more
    for step in steps:
        if isinstance(step, Problem):
            rest, searched, goes_on = "", 0, False
            while waiting and waiting[-1][1] is None:
                waiting.pop()
            yield step
            continue
        rest += step.text
        # Most texts are short, and a generator for each would take a tenth of all time.
        if len(rest) > PIECE:
            *parts, rest = pieces(rest, encoder.encoding, searched)
            waiting += [(part, None) for part in parts]
            searched = max(len(rest) - MARGIN, 0)
        if step.last:
            waiting.append((rest, step))
            rest, searched = "", 0
        size += len(step.text)
        # The end of a document whose beginning is written does not wait: a problem of the next one
        # would be taken for its own.
        if size >= BATCH or (goes_on and step.last):
            yield from _encoded(waiting, encoder)
            waiting, size = [], 0
        goes_on = not step.last
    yield from _encoded(waiting, encoder)


def _encoded(waiting: Waiting, encoder: Encoder) -> Iterator[Encoded | Problem]:
    """Encode what waits."""
    if not waiting:
        return
    documents = [text for _, text in waiting if text]
    try:
        tokens, sizes = encoder.encode_pieces([part for part, _ in waiting])
    except ValueError as error:
        # A text that comes in several pieces is cut small enough for the tokenizer.
        if not documents:
            raise
        if len(documents) == 1 and waiting[-1][1]:
            yield Problem(documents[0].item, "cannot be encoded", f"the tokenizer gave up: {error}")
            return
        start = 0
        for stop, (_, text) in enumerate(waiting, 1):
            if text or stop == len(waiting):
                yield from _encoded(waiting[start:stop], encoder)
                start = stop
        return
    stops = np.cumsum(sizes)[[text is not None for _, text in waiting]]
    tokens = np.insert(tokens, stops, end_of_document(encoder.encoding))
    yield Encoded(tokens, documents, stops + np.arange(1, len(stops) + 1))


# --- write --------------------------------------------------------------------------------------


class _PartWriter:
    """Tokens into an open file, the rest in memory until `document`."""

    def __init__(self, file: BinaryIO, item_bytes: int) -> None:
        self._file, self._item_bytes = file, item_bytes
        self._written = self._whole = 0
        """Tokens in the file, and those of whole documents."""
        self._n_items = 0
        self._records: list[tuple[int, int, int, int, bool]] = []
        self._signatures: list[npt.NDArray[np.uint32]] = []
        self._counts: Counter[str] = Counter()
        self._problems: list[list[Any]] = []

    def take(self, step: Encoded | Problem) -> None:
        """The next step of the pipe."""
        if isinstance(step, Problem):
            self._leave_out(step)
            return
        self._file.write(np.ascontiguousarray(step.tokens).view(np.uint8).data)
        for document, stop in zip(step.documents, step.ends.tolist(), strict=True):
            item, _, _, length, code, validation, made = document
            end = self._written + stop
            self._records.append((item, end - self._whole, length, code, validation))
            self._whole, self._n_items = end, max(self._n_items, item + 1)
            if made is not None:
                self._signatures.append(made)
        self._written += len(step.tokens)

    def _leave_out(self, problem: Problem) -> None:
        """Count the problem, and drop what is written of its document."""
        if self._written > self._whole:
            self._file.seek(self._whole * self._item_bytes)
            self._file.truncate()
            self._written = self._whole
        self._n_items = max(self._n_items, problem.item + 1)
        if problem.reason:
            self._counts[problem.reason] += 1
            if self._counts[problem.reason] <= SHOWN:
                self._problems.append(list(problem))

    def document(self, minhashes: int, more: dict[str, Any]) -> bytes:
        """The content of `.doc`; `more` are entries of its head."""
        table = np.array(self._records, list(FIELDS.items()))
        head = {
            "documents": len(self._records),
            "minhashes": minhashes,
            "n_items": self._n_items,
            "counts": self._counts,
            "problems": self._problems,
        }
        raw = [json.dumps(head | more).encode() + b"\n"]
        raw += [table[name].tobytes() for name in FIELDS]
        raw += [row.astype("<u4").tobytes() for row in self._signatures]
        return b"".join(raw)

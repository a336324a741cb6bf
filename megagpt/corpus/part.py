"""The part that a worker makes of a unit: tokens in `N.bin`, what is known of them in `N.doc`.

Both are written to a temporary name, flushed and renamed, `.doc` last: a unit whose `.doc` exists
is done. `.doc` is a line of JSON and the raw arrays of `Part`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megagpt.corpus.clean import signature, text_hash
from megagpt.corpus.contamination import Hashes, clean_pieces
from megagpt.corpus.source import Unit
from megagpt.corpus.stream import TRUNCATED
from megagpt.corpus.unit import Item, LargeText, Problem, file_problem, unit_items
from megagpt.files import write_durably
from megagpt.tokenizer import END_OF_DOCUMENT, end_of_document
from megagpt.tokenizer.encoder import Encoder, pieces

BATCH = 1 << 20
"""Characters that are encoded at a time: bounds a worker's memory."""
SHOWN = 20
"""Problems of a kind that a unit describes; the rest is counted."""
FIELDS = {"items": "<i8", "sizes": "<i8", "bytes": "<i8", "hashes": "<u8", "validation": "u1"}


@dataclass(frozen=True)
class Settings:
    """What the workers have to know."""

    folder: Path
    """Where parts go."""
    text_field: str = "text"
    validation_fraction: float = 0.0
    hashed: bool = False
    """Whether documents are hashed for the search of duplicates."""
    minhashes: int = 0
    """Hashes of a MinHash signature; 0 makes none."""
    grams: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    """13-grams to remove, sorted."""


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
    n_items: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """Documents left out, by reason."""
    problems: list[list[Any]] = field(default_factory=list)
    """[item, reason, detail, path] of the first few of each reason."""
    notes: dict[str, int] = field(default_factory=dict)
    """Documents changed or remarkable."""
    digest: str = ""
    """Of the unit's payload, to know the same input after a restart."""


def part_path(folder: Path, number: int, ending: str) -> Path:
    """`N.bin` or `N.doc` of a unit."""
    return folder / f"{number:09d}.{ending}"


def payload_digest(payload: Any) -> str:
    """A digest of what a unit carries; empty when it carries nothing."""
    if payload is None:
        return ""
    content = payload if isinstance(payload, bytes) else repr(payload).encode("utf-8", "replace")
    return blake2b(content, digest_size=16).hexdigest()


def read_digest(path: Path) -> str:
    """The digest in the first line of a unit's file."""
    with path.open("rb") as file:
        return str(json.loads(file.readline())["digest"])


def read_part(path: Path) -> Part:
    """Read a `.doc` file."""
    content = path.read_bytes()
    line, _, raw = content.partition(b"\n")
    head = json.loads(line)
    count, hashes = head.pop("documents"), head.pop("minhashes")
    arrays: dict[str, Any] = {}
    place = 0
    for name, kind in FIELDS.items():
        arrays[name] = np.frombuffer(raw, kind, count, place)
        place += arrays[name].nbytes
    signatures = np.frombuffer(raw, "<u4", count * hashes, place).reshape(count, hashes)
    return Part(**arrays, signatures=signatures, **head)


@dataclass(frozen=True)
class PartJob:
    """Parts as what worker processes make; see megagpt.corpus.pool."""

    settings: Settings
    encoder: Encoder

    @property
    def folder(self) -> Path:
        """Where parts go."""
        return self.settings.folder

    @property
    def note(self) -> str:
        """Why the encoder is not the fast one, if it is not."""
        return self.encoder.note

    def start(self) -> None:
        """Check the fast encoder."""
        self.encoder.check()

    def run(self, unit: Unit) -> None:
        """Make the part of one unit."""
        write_part(unit, self.settings, self.encoder)


def utf8(text: str) -> tuple[str, bytes]:
    """A text that UTF-8 can say, and its bytes. As with tiktoken, a pair of surrogates becomes one
    character and a lone one U+FFFD."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text, text.encode()


def write_part(unit: Unit, settings: Settings, encoder: Encoder) -> None:
    """Make the part of one unit. Raises OSError when the disk is full."""
    temporary = part_path(settings.folder, unit.number, "bin.tmp")
    with temporary.open("wb", buffering=0) as file:
        writer = _PartWriter(file, settings, encoder)
        for item in unit_items(unit, settings.text_field):
            writer.take(item)
        document = writer.finish(payload_digest(unit.payload))
        os.fsync(file.fileno())
    temporary.replace(part_path(settings.folder, unit.number, "bin"))
    write_durably(part_path(settings.folder, unit.number, "doc"), document)


class _PartWriter:
    """Tokens into an open file, the rest in memory until `finish`."""

    def __init__(self, file: BinaryIO, settings: Settings, encoder: Encoder) -> None:
        self._file, self._settings, self._encoder = file, settings, encoder
        self._end = np.array([end_of_document(encoder.encoding)], encoder.dtype)
        self._limit = int(settings.validation_fraction * 2**64)
        self._item = -1
        self._records: list[tuple[int, int, int, int, int]] = []
        self._signatures: list[npt.NDArray[np.uint32]] = []
        self._texts: list[str] = []
        self._waiting: list[tuple[int, int, int, bool]] = []
        self._chars = 0
        self._counts: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._problems: list[list[Any]] = []

    def take(self, item: Item) -> None:
        """The next item of the unit."""
        self._item += 1
        if isinstance(item, Problem):
            self._left_out(item)
        elif isinstance(item, LargeText):
            self._large(item)
        else:
            self._add(item)

    def finish(self, digest: str) -> bytes:
        """Write what waits; the content of `.doc`."""
        self._flush()
        columns = list(zip(*self._records, strict=True)) or [()] * len(FIELDS)
        head = {
            "documents": len(self._records),
            "minhashes": self._settings.minhashes,
            "n_items": self._item + 1,
            "counts": dict(self._counts),
            "problems": self._problems,
            "notes": {key: count for key, count in self._notes.items() if count},
            "digest": digest,
        }
        raw = [json.dumps(head).encode() + b"\n"]
        for kind, column in zip(FIELDS.values(), columns, strict=True):
            raw.append(np.array(column, kind).tobytes())
        raw += [row.astype("<u4").tobytes() for row in self._signatures]
        return b"".join(raw)

    def _left_out(self, problem: Problem, item: int | None = None) -> None:
        if not problem.reason:
            return
        self._counts[problem.reason] += 1
        if self._counts[problem.reason] <= SHOWN:
            item = self._item if item is None else item
            self._problems.append([item, problem.reason, problem.detail, problem.path])

    def _add(self, text: str) -> None:
        """One document: hash it, clean it, queue what stays of it."""
        given = text
        text, content = utf8(given)
        self._notes["lone surrogates replaced by U+FFFD"] += text is not given
        if END_OF_DOCUMENT in text:
            self._notes[f"the literal {END_OF_DOCUMENT} kept as text"] += 1
        code = text_hash(content) if self._limit or self._settings.hashed else 0
        validation = code < self._limit
        if len(self._settings.grams):
            stay = clean_pieces(text, self._settings.grams)
            if not stay:
                self._left_out(Problem("evaluation text"))
            elif stay[0] != text:
                self._notes["evaluation text cut out"] += 1
            for piece in stay:
                content = piece.encode()
                self._queue(piece, len(content), text_hash(content), validation)
        else:
            self._queue(text, len(content), code, validation)

    def _queue(self, text: str, size: int, code: int, validation: bool) -> None:
        self._texts.append(text)
        self._waiting.append((self._item, size, code, validation))
        self._chars += len(text)
        if self._chars >= BATCH:
            self._flush()

    def _flush(self) -> None:
        """Encode and write what is queued."""
        texts, waiting = self._texts, self._waiting
        self._texts, self._waiting, self._chars = [], [], 0
        if not texts:
            return
        try:
            tokens, sizes = self._encoder.encode(texts)
        except Exception as error:
            if not isinstance(error, ValueError):
                raise
            if len(texts) > 1:  # find the one that cannot be encoded
                for text, record in zip(texts, waiting, strict=True):
                    self._texts, self._waiting = [text], [record]
                    self._flush()
                return
            detail = f"the tokenizer gave up: {error}"
            self._left_out(Problem("cannot be encoded", detail), waiting[0][0])
            return
        self._put(tokens)
        for size, (item, length, code, validation) in zip(sizes.tolist(), waiting, strict=True):
            self._records.append((item, size, length, code, validation))
        if self._settings.minhashes:
            self._signatures += [signature(text, self._settings.minhashes) for text in texts]

    def _large(self, large: LargeText) -> None:
        """A text file in pieces; read whole where a filter wants the whole text."""
        self._flush()
        start = self._file.tell()
        try:
            if len(self._settings.grams) or self._settings.minhashes:
                self._add("".join(large.pieces()))
            else:
                self._stream(large)
        except UnicodeDecodeError as error:
            self._file.seek(start)
            self._file.truncate()
            self._left_out(Problem("invalid UTF-8", f"{error.reason}", large.path))
        except (EOFError, *TRUNCATED) as error:
            if isinstance(error, OSError) and error.filename != large.path and error.errno:
                raise  # of our own output
            self._file.seek(start)
            self._file.truncate()
            self._left_out(file_problem(large.path, large.compression, error))

    def _stream(self, large: LargeText) -> None:
        digest, length, size, rest = blake2b(digest_size=8), 0, 0, ""
        pattern = self._encoder.encoding._pat_str
        literal = False
        for text in large.pieces():
            content = text.encode()
            digest.update(content)
            length += len(content)
            literal |= END_OF_DOCUMENT in text
            *parts, rest = pieces(rest + text, pattern)
            size += self._put(self._encoder.encode_pieces(parts)[0])
        size += self._put(self._encoder.encode_pieces([rest])[0]) + self._put(self._end)
        code = int.from_bytes(digest.digest(), "little")
        self._notes[f"the literal {END_OF_DOCUMENT} kept as text"] += literal
        self._records.append((self._item, size, length, code, code < self._limit))

    def _put(self, tokens: npt.NDArray) -> int:
        view = np.ascontiguousarray(tokens).view(np.uint8).data
        while view:
            view = view[self._file.write(view) :]
        return len(tokens)

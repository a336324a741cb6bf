"""The part that a worker makes of a unit: tokens in `N.bin`, what is known of them in `N.doc`.

    read -> clean -> encode -> write (here)

Both files are written to a temporary name, flushed and renamed, `.doc` last: a unit whose `.doc`
exists is done. `.doc` is a line of JSON and the raw arrays of `Part`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megagpt.corpus.clean import Note, Rules, clean
from megagpt.corpus.encode import Encoded, encode
from megagpt.corpus.summary import SHOWN
from megagpt.corpus.texts import Problem, read
from megagpt.corpus.unfinished import believed, payload_digest, unit_path
from megagpt.corpus.unit import Unit
from megagpt.files import whole_file, write_durably
from megagpt.tokenizer.encoder import Encoder

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


class PartMaker:
    """Makes the part of a unit, in a worker process; see megagpt.corpus.workers."""

    def __init__(self, folder: Path, text_field: str, rules: Rules, encoder: Encoder) -> None:
        self._folder, self._text_field = folder, text_field
        self._rules, self._encoder = rules, encoder
        self._checked = False

    def __call__(self, unit: Unit) -> str:
        """Write the part; why the encoder is not the fast one, if it is not.

        Raises OSError when the disk is full.
        """
        if not self._checked:
            self._encoder.check()
            self._checked = True
        items = read(unit, self._text_field)
        steps = encode(clean(items, self._rules), self._encoder)
        with whole_file(unit_path(self._folder, unit.number, "bin")) as file:
            writer = _PartWriter(file, self._encoder.dtype.itemsize)
            for step in steps:
                writer.take(step)
            document = writer.document(payload_digest(unit.payload), self._rules.minhashes)
        write_durably(unit_path(self._folder, unit.number, "doc"), document)
        return self._encoder.note


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
        self._notes: Counter[str] = Counter()
        self._problems: list[list[Any]] = []

    def take(self, step: Encoded | Problem | Note) -> None:
        """The next step of the pipe."""
        if isinstance(step, Encoded):
            self._write(step)
        elif isinstance(step, Problem):
            self._leave_out(step)
        else:
            self._notes[step.text] += 1

    def _write(self, encoded: Encoded) -> None:
        self._file.write(np.ascontiguousarray(encoded.tokens).view(np.uint8).data)
        for document, stop in zip(encoded.documents, encoded.ends.tolist(), strict=True):
            item, _, _, length, code, validation, signature = document
            end = self._written + stop
            self._records.append((item, end - self._whole, length, code, validation))
            self._whole, self._n_items = end, max(self._n_items, item + 1)
            if signature is not None:
                self._signatures.append(signature)
        self._written += len(encoded.tokens)

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

    def document(self, digest: str, minhashes: int) -> bytes:
        """The content of `.doc`."""
        table = np.array(self._records, list(FIELDS.items()))
        head = {
            "documents": len(self._records),
            "minhashes": minhashes,
            "n_items": self._n_items,
            "counts": self._counts,
            "problems": self._problems,
            "notes": self._notes,
            "digest": digest,
        }
        raw = [json.dumps(head).encode() + b"\n"]
        raw += [table[name].tobytes() for name in FIELDS]
        raw += [row.astype("<u4").tobytes() for row in self._signatures]
        return b"".join(raw)

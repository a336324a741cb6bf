"""The second step of a worker's pipe: what of each text stays, and what is known of it.

    read -> clean (here) -> encode -> write

Decides the split by a hash of the text, cuts evaluation text out, makes the signature for the
search of near-copies. Long documents pass piece by piece unless a filter needs the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.corpus.contamination import clean_pieces
from megagpt.corpus.duplicates import Hashes, signature, text_hash
from megagpt.corpus.texts import Item, Problem, join, utf8
from megagpt.tokenizer import END_OF_DOCUMENT


@dataclass(frozen=True)
class Rules:
    """What is done to every text."""

    validation_fraction: float = 0.0
    by_place: bool = False
    """Whether validation is the end of each text, instead of whole documents by their hash."""
    hashed: bool = False
    """Whether documents are hashed for the search of duplicates."""
    minhashes: int = 0
    """Hashes of a MinHash signature; 0 makes none."""
    grams: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    """13-grams to remove, sorted."""


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


class Note(NamedTuple):
    """Something remarkable about a document that stays."""

    text: str


def clean(items: Iterable[Item], rules: Rules) -> Iterator[Text | Problem | Note]:
    """Apply the rules to every document; problems pass, and what came before them of the same
    document counts for nothing."""
    if rules.by_place:
        yield from _clean_by_place(items, rules)
        return
    limit = int(rules.validation_fraction * 2**64)
    hashed = bool(limit) or rules.hashed
    digest, length, literal = None, 0, False
    for item in join(items) if len(rules.grams) or rules.minhashes else items:
        if isinstance(item, Problem):
            digest, length, literal = None, 0, False
            yield item
            continue
        number, given, last = item
        text, content = utf8(given)
        if text is not given:
            yield Note("lone surrogates replaced by U+FFFD")
        if hashed:
            digest = digest or blake2b(digest_size=8)
            digest.update(content)
        length += len(content)
        literal |= END_OF_DOCUMENT in text
        if not last:
            yield Text(number, text, False)
            continue
        if literal:
            yield Note(f"the literal {END_OF_DOCUMENT} kept as text")
        code = int.from_bytes(digest.digest(), "little") if digest else 0
        if len(rules.grams):
            yield from _cut(number, text, code < limit, rules)
        else:
            made = signature(text, rules.minhashes) if rules.minhashes else None
            yield Text(number, text, True, length, code, code < limit, made)
        digest, length, literal = None, 0, False


def _clean_by_place(items: Iterable[Item], rules: Rules) -> Iterator[Text | Problem | Note]:
    """Each text as one of train and, behind it, one of validation."""
    for item in join(items):
        if isinstance(item, Problem):
            yield item
            continue
        number, text, _ = item
        cut = int(len(text) * (1 - rules.validation_fraction))
        for share, part in enumerate((text[:cut], text[cut:])):
            alone = replace(rules, by_place=False, validation_fraction=float(share))
            yield from clean([(number, part, True)] if part else [], alone)


def _cut(item: int, text: str, validation: bool, rules: Rules) -> Iterator[Text | Problem | Note]:
    """What stays of a document without evaluation text: each piece is a document."""
    pieces = clean_pieces(text, rules.grams)
    if not pieces:
        yield Problem(item, "evaluation text")
    elif pieces[0] != text:
        yield Note("evaluation text cut out")
    for piece in pieces:
        content = piece.encode()
        made = signature(piece, rules.minhashes) if rules.minhashes else None
        yield Text(item, piece, True, len(content), text_hash(content), validation, made)

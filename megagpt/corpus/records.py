"""Samples of one's own as a corpus: `prepare(folder, records=...)`, or `documents=...`.

    prepare("data/sums", records=ids, vocabulary=10)                      # ids (N, n_ctx + 1)
    prepare("data/sums", records=[Masked(ids, scored), ...], vocabulary=10)
    prepare("data/talks", documents=[Masked(ids, scored), ...], vocabulary="gpt2")
    prepare("data/images", records=palette.encode(images), vocabulary=palette)

A record is one window of training, read whole and from its start. Documents are packed one after
another, and get their END-OF-DOCUMENT here. Of images, the n_ctx pixels of one are given, and a
record gets Image GPT's start vector in front of them here. A sample may say which of its tokens are
scored as targets; the others are only read.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.corpus.manifest import (
    MANIFEST,
    CorpusManifest,
    Subset,
    new_manifest,
    read_manifest,
    write_manifest,
)
from megagpt.corpus.shards import SHARD_TOKENS, Shard, ShardWriter
from megagpt.corpus.unfinished import FOLDER, State
from megagpt.errors import UsageError
from megagpt.tokenizer import end_of_document, fingerprint, load_tokenizer
from megagpt.tokenizer.palette import Palette

log = logging.getLogger("megagpt.data")

BATCH = 1 << 20
"""Tokens that are written at a time."""
UNSCORED = "no token of it is scored"
"""Why a sample is left out."""

Ids = npt.ArrayLike


class Masked(NamedTuple):
    """A sample of which not every token is scored."""

    ids: Ids
    """(R,) token ids."""
    scored: Ids
    """(R,) 1 or True where the token is scored as a target. The first of a record never is; the
    END-OF-DOCUMENT that follows a document is scored where its last token is."""


def prepare(
    folder: Path | str,
    *,
    records: Iterable[Ids | Masked] | None = None,
    documents: Iterable[Ids | Masked] | None = None,
    vocabulary: str | Path | int | Palette = "gpt2",
    split: str = "train",
    shard_tokens: int = SHARD_TOKENS,
) -> CorpusManifest:
    """Write samples as a corpus in `folder`; does nothing when it holds these very samples.

    `vocabulary`: what `load_tokenizer` takes, or, for records alone, a palette or the number of ids
    that stand for no text. A sample of which nothing is scored is left out, counted in the
    manifest's totals and said. A preparation that was killed is started over by the same call.
    Raises UsageError for samples that make no corpus, and for a folder that holds another one.
    """
    folder = Path(folder)
    if (records is None) == (documents is None):
        raise UsageError(f"{folder}: give either records or documents")
    if split not in ("train", "validation", "test"):
        raise UsageError(f"{folder}: split {split!r}: must be train, validation or test")
    samples = _Samples(folder, vocabulary, documents is not None)
    given = records if documents is None else documents
    assert given is not None
    if (folder / MANIFEST).exists():
        return _there(folder, samples, given, split)
    name = samples.fingerprint if isinstance(vocabulary, Palette) else str(vocabulary)
    plan = {"samples": name, "split": split, "shard_tokens": shard_tokens}
    with State([folder], plan) as state:
        _remove_started(folder)
        try:
            writer = ShardWriter(folder, samples.size, shard_tokens=shard_tokens)
            for tokens, sizes, mask in samples.batches(given):
                writer.add(tokens, sizes, mask)
            if not (shards := writer.close()):
                why = [f"{count} left out: {reason}" for reason, count in samples.left_out.items()]
                raise UsageError(
                    f"{folder}: no sample is left to write ({', '.join(why) or 'none was given'}); "
                    "give one that scores a target"
                )
        except UsageError:  # nothing that a call with other samples would have to go on with
            _remove_started(folder)
            state.remove()
            raise
        manifest = samples.manifest(shards, Subset(split, rule="the samples that were given"))
        write_manifest(manifest)
        state.remove()
    for reason, count in samples.left_out.items():
        log.warning("%s: %d samples left out: %s", folder, count, reason)
    return manifest


def _remove_started(folder: Path) -> None:
    """Removes what a preparation that was killed has written, and nothing of others."""
    own = re.compile(re.escape(folder.resolve().name) + r"_\d{5,}\.(bin|idx|mask)(\.tmp)?")
    for stale in [path for path in folder.iterdir() if own.fullmatch(path.name)]:
        stale.unlink()


def _there(
    folder: Path, samples: _Samples, given: Iterable[Ids | Masked], split: str
) -> CorpusManifest:
    """The corpus that is there. Raises UsageError unless it is of this split, of the vocabulary of
    the samples, and of these."""
    manifest = read_manifest(folder)
    if (manifest.split.name, manifest.fingerprint) != (split, samples.fingerprint):
        raise UsageError(
            f"{folder} already holds a corpus of the {manifest.split.name} split in the vocabulary "
            f"{manifest.tokenizer_name or manifest.vocab_size}; choose another folder, or remove "
            "it first"
        )
    for _ in samples.batches(given):
        pass
    if manifest.preparation.get("samples") != samples.digest.hexdigest():
        raise UsageError(
            f"{folder} already holds another corpus; choose another folder, or remove it first"
        )
    shutil.rmtree(folder / FOLDER, ignore_errors=True)  # killed just before its end
    return manifest


class _Samples:
    """Reads samples one by one: checked, counted, hashed."""

    def __init__(self, folder: Path, vocabulary: Any, documents: bool) -> None:
        """Raises UsageError for what is no vocabulary, or none of documents."""
        self._folder, self._vocabulary = folder, vocabulary
        self.fingerprint = ""
        """Of the vocabulary; empty for ids that stand for no text."""
        self._start = self._end = None
        """The id in front of each record, that behind each document."""
        self._made: Any = vocabulary
        """What the ids come from, as `new_manifest` takes it."""
        if isinstance(vocabulary, str | Path):
            encoding = self._made = load_tokenizer(str(vocabulary))
            self.size, self.fingerprint = encoding.n_vocab, fingerprint(encoding)
            self._end = end_of_document(encoding) if documents else None
        elif documents:
            raise UsageError(
                f"{folder}: vocabulary {vocabulary}: documents end with END-OF-DOCUMENT, which a "
                "tokenizer names; give one, or make records"
            )
        elif isinstance(vocabulary, Palette):
            self.size = self._start = vocabulary.size
            self.fingerprint = vocabulary.fingerprint
        elif isinstance(vocabulary, int | np.integer) and not isinstance(vocabulary, bool):
            self.size = self._made = int(vocabulary)
        else:
            raise UsageError(
                f"{folder}: vocabulary {vocabulary!r}: must be a tokenizer's name or file, a "
                "palette, or the number of ids"
            )
        if not 1 <= self.size < 2**31:
            raise UsageError(f"{folder}: vocabulary {self.size}: must have 1 to {2**31 - 1} ids")
        self.length = 0
        """Tokens of each record."""
        self.masked: bool | None = None
        """Whether the samples have masks; None: there was none yet."""
        self.left_out: Counter[str] = Counter()
        kind = f"{self.size} {self._end}{' start' if self._start is not None else ''}"
        self.digest = hashlib.sha256(kind.encode())

    def manifest(self, shards: Sequence[Shard], split: Subset) -> CorpusManifest:
        """The manifest of those that were written; the vocabulary's file goes into the folder."""
        return new_manifest(
            self._folder,
            str(self._vocabulary),
            self._made,
            shards,
            split=split,
            record_length=self.length,
            totals={"left_out": dict(self.left_out)},
            preparation={"samples": self.digest.hexdigest()},
        )

    def batches(
        self, samples: Iterable[Ids | Masked]
    ) -> Iterator[tuple[npt.NDArray, npt.NDArray[np.int64], npt.NDArray[np.uint8] | None]]:
        """(tokens, sizes, mask) of some samples in a row, as ShardWriter.add takes them."""
        parts: list[tuple[npt.NDArray, npt.NDArray[np.uint8]]] = []
        waiting = 0
        for number, sample in enumerate(samples):
            if (one := self._read(number, sample)) is not None:
                parts.append(one)
                waiting += len(one[0])
            if waiting >= BATCH:
                yield self._joined(parts)
                parts, waiting = [], 0
        if parts:
            yield self._joined(parts)

    def _joined(
        self, parts: list[tuple[npt.NDArray, npt.NDArray[np.uint8]]]
    ) -> tuple[npt.NDArray, npt.NDArray[np.int64], npt.NDArray[np.uint8] | None]:
        tokens = np.concatenate([ids for ids, _ in parts])
        mask = np.concatenate([scored for _, scored in parts])
        sizes = np.array([len(ids) for ids, _ in parts], np.int64)
        for content in (sizes, tokens, mask if self.masked else mask[:0]):
            self.digest.update(content.tobytes())
        return tokens, sizes, mask if self.masked else None

    def _read(
        self, number: int, sample: Ids | Masked
    ) -> tuple[npt.NDArray, npt.NDArray[np.uint8]] | None:
        """(ids (R,) int64, mask (R,)) of a sample, END-OF-DOCUMENT added; None: left out."""
        masked = isinstance(sample, Masked)
        ids = self._ids(number, sample.ids if isinstance(sample, Masked) else sample)
        if self.masked not in (None, masked):
            what = "a mask and others have none" if masked else "no mask and others have one"
            raise self._wrong(number, f"has {what}", "give all of them one, or none")
        self.masked = masked
        if not isinstance(sample, Masked):
            mask = np.ones(len(ids), np.uint8)
        else:
            mask = _array(sample.scored)
            if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
                rule = f"its mask must be {len(ids)} of 0 and 1, one for each id"
                raise self._wrong(number, "has a mask that does not fit", rule)
            mask = mask.astype(np.uint8)
        if self._start is not None:
            ids, mask = np.append(self._start, ids), np.append(not masked, mask)
        elif self._end is None:
            mask[0] = 0 if masked else 1
        else:
            ids, mask = np.append(ids, self._end), np.append(mask, mask[-1])
        if not mask.any():
            self.left_out[UNSCORED] += 1
            return None
        return ids, mask

    def _ids(self, number: int, given: Ids) -> npt.NDArray[np.int64]:
        """The ids (R,). Raises UsageError for what is no sample."""
        ids = _array(given)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise self._wrong(number, f"is {ids.dtype} {ids.shape}", "give integers, one row each")
        if int(ids.min()) < 0 or int(ids.max()) >= self.size:
            wrong = next(int(i) for i in ids if not 0 <= i < self.size)
            raise self._wrong(number, f"holds the id {wrong}", f"ids are 0 to {self.size - 1}")
        if self._end is not None:
            if (ids == self._end).any():
                rule = "each document gets it at its end, and has it nowhere else"
                raise self._wrong(number, f"holds END-OF-DOCUMENT ({self._end})", rule)
            return ids.astype(np.int64)
        length = len(ids) + (self._start is not None)
        self.length = self.length or length
        if length != self.length or self.length < 2:
            more = " + 1" if self._start is None else ""
            rule = f"all records have one length, n_ctx{more}, of at least {2 - (not more)} tokens"
            raise self._wrong(number, f"has {len(ids)} tokens", rule)
        return ids.astype(np.int64)

    def _wrong(self, number: int, what: str, rule: str) -> UsageError:
        return UsageError(f"{self._folder}: sample {number} {what}; {rule}")


def _array(given: Ids) -> npt.NDArray:
    """As numpy takes it; what makes no array, such as rows of unlike lengths, as one object."""
    try:
        return np.asarray(given)
    except ValueError:
        return np.array(None)

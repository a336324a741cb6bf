"""What is in a folder of shards: totals, lengths of documents, the first documents as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.corpus.manifest import CorpusManifest, Shard, read_manifest
from megagpt.corpus.shards import Index, read_index
from megagpt.corpus.verify import file_problem
from megagpt.errors import DamageError
from megagpt.files import file_sha256
from megagpt.tokenizer import load_tokenizer

BAR = 40
"""Characters of the longest bar of the histogram."""


def _index(manifest: CorpusManifest, shard: Shard) -> Index:
    """The index of a shard. Raises DamageError when it is not the one that was written."""
    path = manifest.index_path(shard)
    index = read_index(path)
    if file_sha256(path) != shard.index_sha256:
        raise DamageError(f"{path}: not as it was written; run megagpt data verify")
    return index


def document_sizes(manifest: CorpusManifest) -> npt.NDArray[np.int64]:
    """(documents,) tokens of each document, END-OF-DOCUMENT included, in order."""
    sizes = [np.diff(_index(manifest, shard).bounds) for shard in manifest.shards]
    return np.concatenate([np.zeros(0, np.int64), *sizes])


def first_documents(manifest: CorpusManifest, count: int) -> Iterator[npt.NDArray]:
    """The tokens of the first documents, END-OF-DOCUMENT included."""
    for shard in manifest.shards:
        index = _index(manifest, shard)
        path = manifest.bin_path(shard)
        try:
            tokens = np.memmap(path, dtype=manifest.dtype, mode="r")
            if len(tokens) != shard.tokens:
                raise ValueError(f"{len(tokens):,} tokens, {shard.tokens:,} were written")
        except (OSError, ValueError) as error:
            raise DamageError(
                f"{path}: cannot be read ({error}); run megagpt data verify"
            ) from None
        for start, end in pairwise(index.bounds):
            if count == 0:
                return
            count -= 1
            yield tokens[start:end]


def describe(folder: Path | str, documents: int = 3, characters: int = 300) -> str:
    """Totals, a histogram of document lengths and the start of the first documents.

    Raises UsageError or DamageError when the folder or its tokenizer cannot be read.
    """
    try:
        return _describe(folder, documents, characters)
    except (IndexError, KeyError, ValueError) as error:
        # An index that leads out of its shard, an id that the tokenizer has not.
        raise DamageError(f"{folder}: damaged ({error}); run megagpt data verify") from None


def _describe(folder: Path | str, documents: int, characters: int) -> str:
    manifest = read_manifest(folder)
    lines = _totals(manifest)
    if not manifest.record_length:
        lines += _histogram(document_sizes(manifest))
    if documents:
        what = "record" if manifest.record_length else "document"
        read = _reader(manifest)
        for number, tokens in enumerate(first_documents(manifest, documents)):
            try:
                text = read(tokens[: 4 * characters].tolist())
            except KeyError as error:
                raise DamageError(
                    f"{folder}: {what} {number}: {error.args[0]}; run megagpt data verify"
                ) from None
            cut = "..." if len(text) > characters else ""
            lines += ["", f"{what} {number} ({len(tokens):,} tokens):", text[:characters] + cut]
    return "\n".join(lines)


def _reader(manifest: CorpusManifest) -> Callable[[list[int]], str]:
    """Ids to text, or to ids where no tokenizer made them."""
    if not manifest.tokenizer_name or manifest.record_start >= 0:
        return lambda ids: " ".join(map(str, ids))
    return load_tokenizer(manifest.tokenizer, manifest.fingerprint).decode


def _targets(manifest: CorpusManifest) -> list[str]:
    """How much of a masked corpus is scored."""
    if not manifest.masked:
        return []
    scored = longest = current = 0
    for shard in manifest.shards:
        path = manifest.mask_path(shard)
        if problem := file_problem(path, shard.tokens):
            raise DamageError(f"{problem}; run megagpt data verify")
        mask = np.fromfile(path, np.uint8)
        scored += int(np.count_nonzero(mask))
        places = np.flatnonzero(mask)
        if not len(places):
            current += len(mask)
        else:
            gaps = np.diff(places) - 1
            longest = max(longest, current + int(places[0]), int(gaps.max(initial=0)))
            current = len(mask) - 1 - int(places[-1])
        longest = max(longest, current)
    share = scored / max(manifest.tokens, 1)
    line = f"{scored:,} tokens ({share:.1%}) are scored as targets"
    if manifest.record_length:
        return [line]
    # A window of n_ctx targets may lie within it.
    return [f"{line}; the longest stretch without one has {longest:,} tokens"]


def _totals(manifest: CorpusManifest) -> list[str]:
    size = sum(shard.bytes for shard in manifest.shards)
    last = manifest.end_of_document
    end = f", END-OF-DOCUMENT {last}" if last >= 0 else ""
    kind, what = ("palette", "colours") if manifest.record_start >= 0 else ("tokenizer", "tokens")
    lines = [
        f"{manifest.folder}: {manifest.split.name} split, {len(manifest.shards)} shards, "
        f"{size / 1e6:,.1f} MB of {manifest.dtype.name}",
        f"{kind} {manifest.tokenizer_name or 'none'}: {manifest.vocab_size:,} {what}{end}",
    ]
    if length := manifest.record_length:
        lines.append(
            f"{manifest.documents:,} records of {length:,} tokens, for n_ctx {length - 1:,}"
        )
    else:
        lines.append(f"{manifest.documents:,} documents, {manifest.tokens:,} tokens")
    lines += _targets(manifest)
    text_bytes = manifest.totals.get("text_bytes")
    if text_bytes:
        lines.append(
            f"{text_bytes / 1e6:,.1f} MB of text, {text_bytes / max(manifest.tokens, 1):.2f} bytes "
            "per token"
        )
    for reason, count in manifest.totals.get("left_out", {}).items():
        lines.append(f"left out while preparing: {count:,} ({reason})")
    return lines


def _histogram(sizes: npt.NDArray[np.int64]) -> list[str]:
    """Documents by length, in powers of two."""
    if not len(sizes):
        return ["no documents"]
    lines = [
        f"document length: shortest {sizes.min():,}, median {int(np.median(sizes)):,}, mean "
        f"{sizes.mean():,.0f}, longest {sizes.max():,} tokens"
    ]
    # Exact for every int64 below 2^53: frexp gives the number of bits.
    bits = np.frexp(sizes.astype(np.float64))[1]
    counts = np.bincount(bits)
    width = len(f"{2 ** len(counts):,}")
    for bit in range(int(bits.min()), len(counts)):
        bar = "#" * int(np.ceil(BAR * counts[bit] / counts.max()))
        low, high = 1 << (bit - 1), (1 << bit) - 1
        lines.append(f"{low:>{width},} to {high:>{width},}  {counts[bit]:>12,}  {bar}".rstrip())
    return lines

"""What is in a folder of shards: totals, lengths of documents, the first documents as text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.corpus.manifest import CorpusManifest, Shard, read_manifest
from megagpt.corpus.shards import Index, read_index
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
    lines = [*_totals(manifest), *_histogram(document_sizes(manifest))]
    if documents:
        encoding = load_tokenizer(manifest.tokenizer, manifest.fingerprint)
        for number, tokens in enumerate(first_documents(manifest, documents)):
            try:
                text = encoding.decode(tokens[: 4 * characters].tolist())
            except KeyError as error:
                raise DamageError(
                    f"{folder}: document {number}: {error.args[0]}; run megagpt data verify"
                ) from None
            cut = "..." if len(text) > characters else ""
            lines += ["", f"document {number} ({len(tokens):,} tokens):", text[:characters] + cut]
    return "\n".join(lines)


def _totals(manifest: CorpusManifest) -> list[str]:
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{manifest.folder}: {manifest.split.name} split, {len(manifest.shards)} shards, "
        f"{size / 1e6:,.1f} MB of {manifest.dtype.name}",
        f"tokenizer {manifest.tokenizer_name}: {manifest.vocab_size:,} tokens, END-OF-DOCUMENT "
        f"{manifest.end_of_document}",
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens",
    ]
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

"""Is a corpus whole? Checksums, index against data, END-OF-DOCUMENT or the length of records, ids,
masks, the tokenizer.

`verify_files` hashes and nothing else: training runs it over the shards that it is going to read.
`verify_shards` reads every token as well. Both return a list of problems, empty when all is well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.corpus.manifest import CorpusManifest, read_manifest
from megagpt.corpus.shards import Index, Shard, index_problem, read_index
from megagpt.errors import DamageError, MegagptError
from megagpt.files import BLOCK, file_sha256
from megagpt.tokenizer.portable import tokenizer_content

Progress = Callable[[int], None]
"""Told the bytes that have been read since the last call."""


def verify_files(
    manifest: CorpusManifest,
    shard_names: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Compare size and sha256 of a shard's files with the manifest; `shard_names` limits it."""
    wanted = None if shard_names is None else set(shard_names)
    problems: list[str] = []
    for shard in manifest.shards:
        if wanted is None or shard.name in wanted:
            problems += _size_problems(manifest, shard) or [
                _digest_problem(path, file_sha256(path, progress), digest)
                for path, _, digest in manifest.files(shard)
            ]
    return [problem for problem in problems if problem]


def verify_shards(folder: Path | str, progress: Progress | None = None) -> list[str]:
    """Check everything about the shards in `folder`, reading each byte once.

    Raises UsageError or DamageError when there is no manifest to compare with.
    """
    manifest = read_manifest(folder)
    problems = [*_strangers(manifest), tokenizer_problem(manifest, every=True)]
    for shard in manifest.shards:
        problems += _size_problems(manifest, shard) or [
            *_shard_problems(manifest, shard, progress),
            *_mask_problems(manifest, shard, progress),
        ]
    return [problem for problem in problems if problem]


def file_problem(path: Path, size: int | None = None) -> str:
    """What is wrong with a file that a manifest lists, without reading it; "" for nothing."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        return f"{path}: missing, though the manifest beside it lists it"
    except OSError as error:
        return f"{path}: {error.strerror}"
    if size not in (None, actual):
        return f"{path}: has {actual} bytes, the manifest beside it says {size}"
    return ""


def tokenizer_problem(manifest: CorpusManifest, every: bool = False) -> str:
    """What is wrong with the tokenizer's file in the folder; "" for nothing.

    Older manifests have no checksum of it: what it holds is compared. `every` does that with the
    built-in vocabularies too.
    """
    path = Path(manifest.tokenizer)
    file = manifest.tokenizer_name.endswith(".json")
    if file and (problem := file_problem(path)):
        return problem
    if file and manifest.tokenizer_sha256:
        return _digest_problem(path, file_sha256(path), manifest.tokenizer_sha256)
    if file or (every and manifest.tokenizer_name in ("gpt2", "bytes")):
        try:
            tokenizer_content(manifest.tokenizer, manifest.fingerprint)
        except MegagptError as error:
            return str(error)
    return ""


def _digest_problem(path: Path, found: str, expected: str) -> str:
    if found == expected:
        return ""
    return f"{path}: sha256 {found[:12]}..., the manifest says {expected[:12]}...: damaged"


def _size_problems(manifest: CorpusManifest, shard: Shard) -> list[str]:
    problems = (file_problem(path, size) for path, size, _ in manifest.files(shard))
    return [problem for problem in problems if problem]


def _strangers(manifest: CorpusManifest) -> list[str]:
    """Tokens, indexes and masks that the manifest does not know."""
    known = {path for shard in manifest.shards for path, _, _ in manifest.files(shard)}
    found = (p for ending in ("bin", "idx", "mask") for p in manifest.folder.glob(f"*.{ending}"))
    return [f"{path}: not in the manifest" for path in sorted(found) if path not in known]


def _shard_problems(manifest: CorpusManifest, shard: Shard, progress: Progress | None) -> list[str]:
    """What is wrong with tokens and index; each byte is read once."""
    path, index_path = manifest.bin_path(shard), manifest.index_path(shard)
    problems = [_digest_problem(index_path, file_sha256(index_path, progress), shard.index_sha256)]
    index = None
    try:
        index = read_index(index_path)
        if problem := _index_problem(manifest, shard, index):
            problems.append(f"{index_path}: {problem}")
    except DamageError as error:
        problems.append(str(error))
    # Without a sign, what is below 0 is too large as well.
    unsigned = np.dtype(f"<u{manifest.dtype.itemsize}")
    found = _read_once(path, unsigned, manifest.ids, manifest.end_of_document, progress)
    digest, ends, strays, first_stray = found
    problems.append(_digest_problem(path, digest, shard.sha256))
    if strays:
        problems.append(
            f"{path}: {strays} tokens outside the vocabulary of {manifest.ids}, the first "
            f"at token {first_stray}"
        )
    if index is not None and not any(problems):
        problems.append(_content_problem(manifest, shard, index, ends))
    return problems


def _index_problem(manifest: CorpusManifest, shard: Shard, index: Index) -> str:
    """What is wrong with the index alone: type, counts, offsets that follow from the lengths."""
    if index.dtype != manifest.dtype:
        return f"dtype {index.dtype}, the manifest says {manifest.dtype}"
    documents = len(index.documents) - 1
    if documents != shard.documents:
        return f"{documents} documents, the manifest says {shard.documents}"
    return index_problem(index, shard.bytes)


def _content_problem(manifest: CorpusManifest, shard: Shard, index: Index, ends: int) -> str:
    """Every document ends with END-OF-DOCUMENT, and the token stands nowhere else; or every record
    has its length."""
    if manifest.record_length:
        return _record_problem(manifest, shard, index)
    path = manifest.bin_path(shard)
    tokens = np.memmap(path, dtype=manifest.dtype, mode="r")
    missing = np.flatnonzero(tokens[index.bounds[1:] - 1] != manifest.end_of_document)
    if len(missing):
        return (
            f"{path}: {len(missing)} documents do not end with END-OF-DOCUMENT "
            f"({manifest.end_of_document}), the first is document {int(missing[0])}"
        )
    if ends != shard.documents:
        return f"{path}: {ends} END-OF-DOCUMENT tokens for {shard.documents} documents"
    return ""


def _record_problem(manifest: CorpusManifest, shard: Shard, index: Index) -> str:
    """Every record has the length that the manifest tells, and its start where it has one."""
    other = np.flatnonzero(np.asarray(index.sizes) != manifest.record_length)
    if len(other) or len(index.sizes) != shard.documents:
        number = int(other[0]) if len(other) else shard.documents
        return (
            f"{manifest.index_path(shard)}: record {number} has not the "
            f"{manifest.record_length} tokens that the manifest tells"
        )
    if (start := manifest.record_start) >= 0:
        path = manifest.bin_path(shard)
        rows = np.memmap(path, manifest.dtype, "r").reshape(-1, manifest.record_length)
        wrong = np.flatnonzero((rows[:, 0] != start) | (rows[:, 1:] == start).any(1))
        if len(wrong):
            return (
                f"{path}: {len(wrong)} records do not hold {start} at their beginning alone, the "
                f"first is record {int(wrong[0])}"
            )
    return ""


def _mask_problems(manifest: CorpusManifest, shard: Shard, progress: Progress | None) -> list[str]:
    """The checksum of a mask, and that it says yes or no of each token."""
    if not shard.mask_sha256:
        return []
    path = manifest.mask_path(shard)
    digest, _, wrong, first = _read_once(path, np.dtype(np.uint8), 2, 1, progress)
    problems = [_digest_problem(path, digest, shard.mask_sha256)]
    if wrong:
        problems.append(f"{path}: {wrong} bytes are neither 0 nor 1, first at {first}")
    return problems


def _read_once(
    path: Path, dtype: np.dtype[Any], most: int, counted: int, progress: Progress | None
) -> tuple[str, int, int, int]:
    """(sha256, how many numbers are `counted`, how many are `most` or above, the first of these) of
    a file of numbers without a sign."""
    digest, done, found, wrong, first = hashlib.sha256(), 0, 0, 0, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            numbers = np.frombuffer(block, dtype)
            found += int(np.count_nonzero(numbers == counted))
            above = numbers >= most
            if above.any():
                first = first if wrong else done + int(np.argmax(above))
                wrong += int(np.count_nonzero(above))
            done += len(numbers)
            if progress:
                progress(len(block))
    return digest.hexdigest(), found, wrong, first

"""Shards made by others: Megatron pairs, nanoGPT .bin files, llm.c .bin shards.

Pairs in which every sequence ends with END-OF-DOCUMENT are ours already: `import` without an
output writes the missing manifest beside them. Everything else is converted into a new folder;
what others left out (END-OF-DOCUMENT of Megatron without --append-eod) or put elsewhere (in front
of each document in llm.c) comes right on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.corpus.manifest import MANIFEST, CorpusManifest, new_manifest, write_manifest
from megagpt.corpus.shards import SHARD_TOKENS, Index, Shard, ShardWriter, read_index
from megagpt.errors import DamageError, UsageError
from megagpt.files import file_sha256
from megagpt.tokenizer import end_of_document, load_tokenizer, token_dtype

LLMC_MAGIC = 20240520
LLMC_HEADER = 1024
"""Bytes: 256 int32."""
BATCH = 1 << 22
"""Tokens converted at a time."""

Documents = Iterator[tuple[npt.NDArray, npt.NDArray[np.int64]]]
"""(tokens, sizes) of some documents, each with END-OF-DOCUMENT."""


@dataclass(frozen=True)
class _File:
    """One file of others' shards."""

    path: Path
    format: str
    """megatron | nanogpt | llmc"""


def import_shards(
    inputs: Sequence[Path | str],
    output: Path | None = None,
    *,
    tokenizer: str = "gpt2",
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> CorpusManifest:
    """Make shards of others ours; `inputs` are .bin files, Megatron prefixes or a folder of them.

    Without `output` the inputs must be Megatron pairs in one folder that can stay as they are; a
    manifest is written beside them. With `output` everything is converted into that folder.
    Raises UsageError or DamageError with the file that does not fit.
    """
    files = _find(inputs)
    encoding = load_tokenizer(tokenizer)
    if output is None:
        return _adopt(files, tokenizer, progress)
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty; choose another --output or empty it")
    output.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(output, encoding.n_vocab, shard_tokens=shard_tokens)
    end = end_of_document(encoding)
    readers = {"megatron": _megatron, "nanogpt": _nanogpt, "llmc": _llmc}
    for file in files:
        for tokens, sizes in readers[file.format](file.path, end):
            highest = int(tokens.max()) if len(tokens) else 0
            if highest >= encoding.n_vocab:
                raise UsageError(
                    f"{file.path}: holds token {highest}, outside the {encoding.n_vocab} of "
                    f"{tokenizer}; name the tokenizer that made it with --tokenizer"
                )
            writer.add(tokens, sizes)
            if progress:
                progress(tokens.nbytes)
    manifest = _manifest(output, tokenizer, writer.close(), files)
    write_manifest(manifest)
    return manifest


def _find(inputs: Sequence[Path | str]) -> list[_File]:
    files = []
    for item in map(Path, inputs):
        if item.is_dir():
            found = sorted(item.glob("*.bin"))
        elif item.is_file():
            found = [item]
        else:
            found = [item.with_name(item.name + ".bin")]
        if not found or not all(path.is_file() for path in found):
            raise UsageError(
                f"{item}: no .bin file there; give files, Megatron prefixes or a folder"
            )
        files += [_File(path, _format(path)) for path in found]
    return files


def _format(path: Path) -> str:
    if path.with_suffix(".idx").exists():
        return "megatron"
    with path.open("rb") as file:
        head = file.read(4)
    return "llmc" if head == LLMC_MAGIC.to_bytes(4, "little") else "nanogpt"


def _adopt(
    files: list[_File], tokenizer: str, progress: Callable[[int], None] | None
) -> CorpusManifest:
    """Write a manifest beside Megatron pairs. Raises UsageError when they have to be converted."""
    folder = files[0].path.parent
    encoding = load_tokenizer(tokenizer)
    dtype, end = token_dtype(encoding.n_vocab), end_of_document(encoding)
    if (folder / MANIFEST).exists():
        raise UsageError(f"{folder} has a {MANIFEST} already; remove it to write another")
    shards = []
    for file in files:
        path = file.path
        reason = ""
        if file.format != "megatron":
            reason = f"a {file.format} file has no index"
        elif path.parent != folder:
            reason = "the pairs lie in different folders"
        else:
            index = read_index(path.with_suffix(".idx"))
            reason = _adoptable(path, index, dtype, end)
        if reason:
            raise UsageError(f"{path}: {reason}; convert it with --output DIR")
        shards.append(_shard(path, index, progress))
    manifest = _manifest(folder, tokenizer, shards, files)
    write_manifest(manifest)
    return manifest


def _adoptable(path: Path, index: Index, dtype: np.dtype, end: int) -> str:
    """Why a pair cannot stay as it is; empty when it can."""
    if index.dtype != dtype:
        return f"its tokens are {index.dtype}, the tokenizer needs {dtype}"
    tokens = _tokens(path, index)
    ends = np.cumsum(index.sizes, dtype=np.int64)
    if len(ends) and int(ends[-1]) != len(tokens):
        return "its documents do not cover the file in order"
    if not np.array_equal(index.pointers, (ends - index.sizes) * np.int64(dtype.itemsize)):
        return "its documents do not cover the file in order"
    lasts = ends[np.asarray(index.documents[1:]) - 1] - 1
    if len(lasts) and np.any(tokens[lasts] != end):
        return "not every document ends with END-OF-DOCUMENT"
    for start in range(0, len(tokens), BATCH):
        part = tokens[start : start + BATCH]
        # The other END-OF-DOCUMENT tokens would be counted as ends of documents.
        inside = np.flatnonzero(part == end) + start
        if len(inside) and not np.isin(inside, lasts).all():
            return "END-OF-DOCUMENT stands inside a document"
    return ""


def _tokens(path: Path, index: Index) -> npt.NDArray:
    size = path.stat().st_size
    needed = 0
    if len(index.sizes):
        needed = int(np.max(index.pointers + index.sizes.astype(np.int64) * index.dtype.itemsize))
    if size < needed or size % index.dtype.itemsize:
        raise DamageError(f"{path}: {size} bytes, its index needs {needed}; copy it again")
    return np.memmap(path, dtype=index.dtype, mode="r") if size else np.zeros(0, index.dtype)


def _shard(path: Path, index: Index, progress: Callable[[int], None] | None) -> Shard:
    return Shard(
        name=path.stem,
        tokens=int(np.sum(index.sizes, dtype=np.int64)),
        documents=len(index.documents) - 1,
        bytes=path.stat().st_size,
        sha256=file_sha256(path, progress),
        index_sha256=file_sha256(path.with_suffix(".idx")),
    )


def _manifest(
    folder: Path, tokenizer: str, shards: Sequence[Shard], files: list[_File]
) -> CorpusManifest:
    totals = {
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
    }
    sources = tuple(
        {
            "path": str(file.path),
            "bytes": file.path.stat().st_size,
            "sha256": file_sha256(file.path),
            "format": file.format,
        }
        for file in files
    )
    return new_manifest(
        folder,
        tokenizer,
        load_tokenizer(tokenizer),
        shards,
        sources=sources,
        totals=totals,
        preparation={"imported": sorted({file.format for file in files})},
    )


def _megatron(path: Path, end: int) -> Documents:
    """Documents of a pair; sequences of one document are joined, a missing end is added."""
    index = read_index(path.with_suffix(".idx"))
    tokens = _tokens(path, index)
    width = index.dtype.itemsize
    for first, last in zip(index.documents, index.documents[1:], strict=False):
        parts = []
        for sequence in range(int(first), int(last)):
            start = int(index.pointers[sequence]) // width
            parts.append(tokens[start : start + int(index.sizes[sequence])])
        document = np.concatenate(parts) if parts else np.zeros(0, index.dtype)
        if len(document) and int(document[-1]) == end:
            document = document[:-1]
        # An end inside a Megatron document is text that looked like one: it ends one here too.
        yield from _split(np.append(document.astype(np.int64), end), end)


def _nanogpt(path: Path, end: int) -> Documents:
    """Documents of raw uint16 tokens, END-OF-DOCUMENT after each."""
    size = path.stat().st_size
    if size % 2:
        raise DamageError(f"{path}: {size} bytes are no uint16 tokens; copy it again")
    tokens = np.memmap(path, dtype="<u2", mode="r") if size else np.zeros(0, np.uint16)
    yield from _stream(tokens, end)


def _llmc(path: Path, end: int) -> Documents:
    """Documents of an llm.c shard, which puts END-OF-DOCUMENT in front of each."""
    size = path.stat().st_size
    head = np.fromfile(path, "<i4", 256)
    if len(head) < 256 or head[1] != 1 or size != LLMC_HEADER + 2 * int(head[2]):
        raise DamageError(
            f"{path}: not a whole llm.c shard of version 1 ({size} bytes); copy it again"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=LLMC_HEADER) if head[2] else head[:0]
    if len(tokens) and int(tokens[0]) == end:
        tokens = tokens[1:]
    yield from _stream(tokens, end)


def _stream(tokens: npt.NDArray, end: int) -> Documents:
    """Documents of tokens in a row with ends between or after them, a batch at a time."""
    rest = np.zeros(0, tokens.dtype)
    for start in range(0, len(tokens), BATCH):
        block = np.concatenate((rest, tokens[start : start + BATCH]))
        ends = np.flatnonzero(block == end)
        cut = int(ends[-1]) + 1 if len(ends) else 0
        yield from _split(block[:cut], end)
        rest = block[cut:]
    if len(rest):
        yield from _split(np.append(rest.astype(np.int64), end), end)


def _split(tokens: npt.NDArray, end: int) -> Documents:
    """Whole documents in a row; those without text are left out."""
    ends = np.flatnonzero(tokens == end)
    sizes = np.diff(np.concatenate(([-1], ends)))
    if np.any(sizes == 1):
        tokens = tokens[np.repeat(sizes > 1, sizes)]
        sizes = sizes[sizes > 1]
    if len(sizes):
        yield tokens, sizes

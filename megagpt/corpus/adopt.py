"""Shards made by others: Megatron pairs, nanoGPT .bin files, llm.c .bin shards, .npy arrays.

Pairs in which every sequence ends with END-OF-DOCUMENT are ours already: `import` without an
output writes the missing manifest beside them. Everything else is converted into a new folder;
what others left out (END-OF-DOCUMENT of Megatron without --append-eod) or put elsewhere (in front
of each document in llm.c) comes right on the way. What a file is, foreign.py finds out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megagpt.corpus.documents import OURS
from megagpt.corpus.foreign import ForeignFile, recognise
from megagpt.corpus.manifest import MANIFEST, CorpusManifest, Subset, new_manifest, write_manifest
from megagpt.corpus.shards import (
    SHARD_TOKENS,
    Index,
    Shard,
    ShardWriter,
    index_problem,
    read_index,
)
from megagpt.corpus.unfinished import FOLDER, State, beside
from megagpt.errors import DamageError, UsageError
from megagpt.files import file_sha256
from megagpt.tokenizer import end_of_document, fingerprint, load_tokenizer, token_dtype

if TYPE_CHECKING:
    import tiktoken

log = logging.getLogger("megagpt.data")

BATCH = 1 << 22
"""Tokens converted at a time."""

Documents = Iterator[tuple[npt.NDArray, npt.NDArray[np.int64]]]
"""(tokens, sizes) of some documents, each with END-OF-DOCUMENT."""


def import_shards(
    inputs: Sequence[Path | str],
    output: Path | None = None,
    *,
    tokenizer: str = "gpt2",
    shard_tokens: int = SHARD_TOKENS,
    raw: str = "",
    progress: Callable[[int], None] | None = None,
) -> list[CorpusManifest]:
    """Make shards of others ours; `inputs` are files, Megatron prefixes or folders of files.

    Without `output` the inputs must be Megatron pairs in one folder that can stay as they are; a
    manifest is written beside them. With `output` everything is converted into that folder, and
    files whose names tell of another split into OUTPUT-validation and OUTPUT-test. An import that
    was killed is started over. `raw` names the numbers of files without a header. Returns the
    manifests; raises UsageError or DamageError with the file that does not fit.
    """
    encoding = load_tokenizer(tokenizer)
    files = [recognise(path, encoding.n_vocab, raw) for path in _find(inputs)]
    if output is None:
        return [_adopt(files, tokenizer, encoding, progress)]
    if output.exists() and any(output.iterdir()) and not (output / FOLDER).is_dir():
        raise UsageError(f"{output} is not empty; choose another --output or empty it")
    folders = _folders(files, output)
    named = [(str(file.path), file.format, file.path.stat()) for file in files]
    plan = {
        "import": [[path, kind, stat.st_size, stat.st_mtime_ns] for path, kind, stat in named],
        "tokenizer": fingerprint(encoding),
        "shard_tokens": shard_tokens,
        "raw": raw,
    }
    manifests = []
    with State(list(folders), plan) as state:
        for folder, own in folders.items():
            writer = ShardWriter(folder, encoding.n_vocab, shard_tokens=shard_tokens)
            for file in own:
                _convert(file, writer, encoding, progress)
            manifests.append(_manifest(folder, tokenizer, encoding, writer.close(), own))
        # Train last, as a preparation does: its manifest says that everything is there.
        for manifest in reversed(manifests):
            write_manifest(manifest)
        state.remove()
    return manifests


def _find(inputs: Sequence[Path | str]) -> list[Path]:
    """The files of the inputs. Raises UsageError for none, for one given twice, and for files that
    something unfinished left."""
    files: list[Path] = []
    for item in map(Path, inputs):
        if item.is_dir():
            found = _of_folder(item)
        elif item.is_file():
            found = [item]
        else:
            found = [item.with_name(item.name + ".bin")]
        if not found or not all(path.is_file() for path in found):
            raise UsageError(
                f"{item}: no .bin file there; give files, Megatron prefixes or a folder"
            )
        files += found
    for folder in {path.parent for path in files}:
        if (folder / FOLDER).is_dir() or any(folder.glob("*.bin.tmp")):
            raise UsageError(
                f"{folder}: a preparation or an import that did not finish left these files; run "
                "its command again, which goes on or starts over"
            )
    known: set[Path] = set()
    for path in files:
        if path.resolve() in known:
            raise UsageError(f"{path} is given twice; give every file once")
        known.add(path.resolve())
    return files


def _of_folder(folder: Path) -> list[Path]:
    """The files of tokens in a folder; what else lies there is told, without hidden names.

    Raises DamageError for an index whose tokens are not there, OSError for an unreadable folder.
    """
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in entries if path.suffix in (".bin", ".npy")]
    known = {*found, *(path.with_suffix(".idx") for path in found)}
    known |= {folder / name for name in OURS}
    left = [path for path in entries if path not in known]
    if alone := [path for path in left if path.suffix == ".idx"]:
        raise DamageError(f"{alone[0]}: its .bin is not beside it; copy the pair again")
    if found and left:
        names = ", ".join(path.name + "/" * path.is_dir() for path in left[:8])
        more = f" and {len(left) - 8:,} more" if len(left) > 8 else ""
        log.warning(
            "%s: only .bin and .npy files are taken, passed over: %s%s", folder, names, more
        )
    return found


def _folders(files: list[ForeignFile], output: Path) -> dict[Path, list[ForeignFile]]:
    """The files of each folder to write: `output` for those of training, or of the only split."""
    found: dict[Path, list[ForeignFile]] = {}
    for split in ("train", "validation", "test"):
        if own := [file for file in files if file.split == split]:
            found[beside(output, f"-{split}") if found else output] = own
    return found


def _convert(
    file: ForeignFile,
    writer: ShardWriter,
    encoding: tiktoken.Encoding,
    progress: Callable[[int], None] | None,
) -> None:
    """Add the documents of a file."""
    end = end_of_document(encoding)
    read = _megatron(file.path, end) if file.format == "megatron" else _stream(file.tokens(), end)
    for tokens, sizes in read:
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < encoding.n_vocab:
                raise UsageError(
                    f"{file.path}: holds token {token}, outside the {encoding.n_vocab} of "
                    f"{encoding.name}; name the tokenizer that made it with --tokenizer"
                )
        writer.add(tokens, sizes)
        if progress:
            progress(tokens.nbytes)


def _adopt(
    files: list[ForeignFile],
    tokenizer: str,
    encoding: tiktoken.Encoding,
    progress: Callable[[int], None] | None,
) -> CorpusManifest:
    """Write a manifest beside Megatron pairs. Raises UsageError when they have to be converted."""
    folder = files[0].path.parent
    if (folder / MANIFEST).exists():
        raise UsageError(f"{folder} has a {MANIFEST} already; remove it to write another")
    splits = {file.split: file.path.name for file in files}
    if len(splits) > 1:
        raise UsageError(
            f"{folder}: its names tell of several splits ({', '.join(splits.values())}), and a "
            "corpus is one; convert them with --output DIR, which makes a corpus of each, or move "
            "each split into a folder of its own and import that"
        )
    shards = []
    for file in files:
        if reason := _why_convert(file, folder, encoding):
            raise UsageError(f"{file.path}: {reason}; convert it with --output DIR")
        shards.append(_shard(file.path, progress))
    manifest = _manifest(folder, tokenizer, encoding, shards, files)
    write_manifest(manifest)
    return manifest


def _pair(path: Path, end: int) -> tuple[Index, npt.NDArray]:
    """(index, tokens) of a pair. Raises DamageError unless they fit each other."""
    index = read_index(path.with_suffix(".idx"))
    if problem := index_problem(index, path.stat().st_size):
        raise DamageError(f"{path.with_suffix('.idx')}: {problem}; copy the pair again")
    # numpy cannot map nothing.
    there = path.stat().st_size > 0
    tokens = np.memmap(path, index.dtype, "r") if there else np.zeros(0, index.dtype)
    bounds = index.bounds
    ends = bounds[1:][np.diff(bounds) > 0]
    missing = np.flatnonzero(tokens[ends - 1] != end)
    if 0 < 2 * len(missing) <= len(ends):
        raise DamageError(
            f"{path}: {len(missing)} of {len(ends)} documents do not end with END-OF-DOCUMENT "
            f"({end}), the first is document {int(missing[0])}: its index is damaged, or pairs "
            "with and without --append-eod were merged; copy it again, or import what was merged"
        )
    return index, tokens


def _why_convert(file: ForeignFile, folder: Path, encoding: tiktoken.Encoding) -> str:
    """Why a file cannot stay as it is; empty when it can."""
    if file.format != "megatron":
        return f"a {file.format} file has no index"
    if file.path.parent != folder:
        return "the pairs lie in different folders"
    dtype, end = token_dtype(encoding.n_vocab), end_of_document(encoding)
    index, tokens = _pair(file.path, end)
    if index.dtype != dtype:
        return f"its tokens are {index.dtype}, the tokenizer needs {dtype}"
    if np.any(np.diff(index.documents) == 0):
        return "a document is empty"
    lasts = index.bounds[1:] - 1
    if np.any(tokens[lasts] != end):
        return "not every document ends with END-OF-DOCUMENT"
    parts = (tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH))
    # Any other END-OF-DOCUMENT would be counted as the end of a document.
    inside = sum(np.count_nonzero(part == end) for part in parts) > len(lasts)
    return "END-OF-DOCUMENT stands inside a document" if inside else ""


def _shard(path: Path, progress: Callable[[int], None] | None) -> Shard:
    index = read_index(path.with_suffix(".idx"))
    return Shard(
        name=path.stem,
        tokens=int(np.sum(index.sizes, dtype=np.int64)),
        documents=len(index.documents) - 1,
        bytes=path.stat().st_size,
        sha256=file_sha256(path, progress),
        index_sha256=file_sha256(path.with_suffix(".idx")),
    )


def _manifest(
    folder: Path,
    tokenizer: str,
    encoding: tiktoken.Encoding,
    shards: Sequence[Shard],
    files: list[ForeignFile],
) -> CorpusManifest:
    if not any(shard.documents for shard in shards):
        raise UsageError(f"{files[0].path}: no document in it or the files beside it")
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
        encoding,
        shards,
        split=Subset(files[0].split, rule="the names of the files that were imported"),
        sources=sources,
        preparation={"imported": sorted({file.format for file in files})},
    )


def _megatron(path: Path, end: int) -> Documents:
    """Documents of a pair; sequences of one document are joined, a missing end is added."""
    index, tokens = _pair(path, end)
    for start, stop in pairwise(index.bounds):
        document = tokens[start:stop]
        if not len(document) or int(document[-1]) != end:
            document = np.append(document.astype(np.int64), end)
        # An end inside a Megatron document is text that looked like one: it ends one here too.
        yield from _split(document, end)


def _stream(tokens: npt.NDArray, end: int) -> Documents:
    """Documents of tokens in a row with ends between, before (llm.c) or after them, a batch at a
    time."""
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

"""manifest.json: what a folder of shards holds, and how to know that it is whole (stdlib, numpy).

    {"format": 1,
     "tokenizer": {"name", "vocab_size", "end_of_document", "fingerprint"},
     "dtype": "uint16" | "int32",
     "split": {"name": "train" | "validation" | "test", "validation_fraction", "rule"},
     "shards": [{"name", "tokens", "documents", "bytes", "sha256", "index_sha256"}, ...],
     "sources": [{"path", "bytes", "sha256"}, ...],
     "totals": {"documents", "tokens", "text_bytes", ...},
     "preparation": {...}}                      the options that made it, for a second run

A shard called `web_00000` is the pair `web_00000.bin` and `web_00000.idx` in the same folder.
When the tokenizer is a file, its name is `tokenizer.json`, a copy in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megagpt.corpus.shards import Shard
from megagpt.errors import DamageError, UsageError
from megagpt.files import write_durably
from megagpt.tokenizer import end_of_document, fingerprint, token_dtype

if TYPE_CHECKING:
    import tiktoken

FORMAT = 1
MANIFEST = "manifest.json"
SPLIT_RULE = (
    "a document belongs to validation when blake2b(UTF-8 text) with a digest of 8 bytes, read as a "
    "little-endian integer, is below validation_fraction * 2^64"
)

__all__ = [
    "MANIFEST",
    "SPLIT_RULE",
    "CorpusManifest",
    "Shard",
    "Subset",
    "new_manifest",
    "read_manifest",
    "write_manifest",
]


@dataclass(frozen=True, slots=True)
class Subset:
    """Which documents of the corpus the folder holds."""

    name: str = "train"
    """train, validation or test."""
    validation_fraction: float = 0.0
    rule: str = SPLIT_RULE


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusManifest:
    """A folder of shards."""

    folder: Path
    tokenizer_name: str
    """A name for `load_tokenizer`, or `tokenizer.json`: see `tokenizer`."""
    vocab_size: int
    end_of_document: int
    fingerprint: str
    """`megagpt.tokenizer.fingerprint` of the encoding; empty when an import did not know it."""
    dtype: np.dtype
    split: Subset = Subset()
    shards: tuple[Shard, ...]
    sources: tuple[dict[str, Any], ...] = ()
    totals: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """All tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """All documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokenizer(self) -> str:
        """What `load_tokenizer` takes: the name, or the path of the copy in the folder."""
        if self.tokenizer_name.endswith(".json"):
            return str(self.folder / self.tokenizer_name)
        return self.tokenizer_name

    def bin_path(self, shard: Shard) -> Path:
        """The tokens of a shard."""
        return self.folder / f"{shard.name}.bin"

    def index_path(self, shard: Shard) -> Path:
        """The index of a shard."""
        return self.folder / f"{shard.name}.idx"


def read_manifest(folder: Path | str) -> CorpusManifest:
    """The manifest in `folder`.

    Raises UsageError when the folder holds no prepared corpus, DamageError when its manifest
    cannot be believed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError:
        raise UsageError(_missing(folder)) from None
    try:
        data = json.loads(content)
        if data["format"] != FORMAT:
            raise UsageError(
                f"{path}: format {data['format']}, this megagpt reads format {FORMAT}; use the "
                "version that wrote it or prepare the corpus again"
            )
        manifest = _parse(folder, data)
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(
            f"{path}: not a manifest ({type(error).__name__}: {error}); prepare or copy the "
            "corpus again"
        ) from None
    problem = _contradiction(manifest)
    if problem:
        raise DamageError(f"{path}: {problem}; prepare or copy the corpus again")
    return manifest


def _missing(folder: Path) -> str:
    """Why there is no manifest, and what to do."""
    if not folder.exists():
        return f"{folder} does not exist; prepare a corpus there with data_prep/tokenize_corpus.py"
    if (folder / ".preparation").is_dir():
        return (
            f"{folder}: its preparation did not finish; run the same data_prep command again, it "
            "continues where it stopped"
        )
    if any(folder.glob("*.bin")):
        return (
            f"{folder} holds .bin files but no {MANIFEST}; `megagpt data import {folder}` writes "
            "one for Megatron, nanoGPT and llm.c files"
        )
    return f"{folder} holds no {MANIFEST}; prepare a corpus there with data_prep/tokenize_corpus.py"


def _parse(folder: Path, data: dict[str, Any]) -> CorpusManifest:
    """The dataclass of the JSON object. Raises KeyError, TypeError or ValueError."""
    tokenizer = data["tokenizer"]
    return CorpusManifest(
        folder=folder,
        tokenizer_name=str(tokenizer["name"]),
        vocab_size=int(tokenizer["vocab_size"]),
        end_of_document=int(tokenizer["end_of_document"]),
        fingerprint=str(tokenizer["fingerprint"]),
        dtype=np.dtype(data["dtype"]).newbyteorder("<"),
        split=Subset(**data["split"]),
        shards=tuple(Shard(**shard) for shard in data["shards"]),
        sources=tuple(data.get("sources", ())),
        totals=dict(data.get("totals", {})),
        preparation=dict(data.get("preparation", {})),
    )


def _contradiction(manifest: CorpusManifest) -> str | None:
    """What in the manifest contradicts itself."""
    if manifest.dtype != token_dtype(manifest.vocab_size):
        return f"dtype {manifest.dtype} does not follow from {manifest.vocab_size} tokens"
    if not 0 <= manifest.end_of_document < manifest.vocab_size:
        return f"end_of_document {manifest.end_of_document} is outside the vocabulary"
    for shard in manifest.shards:
        if shard.bytes != shard.tokens * manifest.dtype.itemsize:
            return f"shard {shard.name}: {shard.bytes} bytes are not {shard.tokens} tokens"
        if Path(shard.name).name != shard.name:
            return f"shard {shard.name!r} is not a file name"
    for key, count in (("tokens", manifest.tokens), ("documents", manifest.documents)):
        if manifest.totals.get(key, count) != count:
            return f"totals say {manifest.totals[key]} {key}, the shards hold {count}"
    return None


def new_manifest(
    folder: Path, tokenizer: str, encoding: tiktoken.Encoding, shards: Sequence[Shard], **more: Any
) -> CorpusManifest:
    """The manifest of shards that `encoding` made; `more` are the other fields. `tokenizer` is what
    `load_tokenizer` took: a file of it is copied into the folder."""
    name, path = encoding.name, Path(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    if name not in ("gpt2", "bytes") and path.is_file():
        write_durably(folder / "tokenizer.json", path.read_bytes())
        name = "tokenizer.json"
    return CorpusManifest(
        folder=folder,
        tokenizer_name=name,
        vocab_size=encoding.n_vocab,
        end_of_document=end_of_document(encoding),
        fingerprint=fingerprint(encoding),
        dtype=token_dtype(encoding.n_vocab),
        shards=tuple(shards),
        **more,
    )


def write_manifest(manifest: CorpusManifest) -> None:
    """Write manifest.json, whole or not at all; it is the last file of a preparation."""
    data = {
        "format": FORMAT,
        "tokenizer": {
            "name": manifest.tokenizer_name,
            "vocab_size": manifest.vocab_size,
            "end_of_document": manifest.end_of_document,
            "fingerprint": manifest.fingerprint,
        },
        "dtype": manifest.dtype.name,
        "split": asdict(manifest.split),
        "shards": [asdict(shard) for shard in manifest.shards],
        "sources": list(manifest.sources),
        "totals": manifest.totals,
        "preparation": manifest.preparation,
    }
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    write_durably(manifest.folder / MANIFEST, text.encode("utf-8", "surrogateescape"))

"""manifest.json: what a folder of shards holds, and how to know that it is whole (stdlib, numpy).

    {"format": 1,
     "tokenizer": {"name", "vocab_size", "end_of_document", "fingerprint", "sha256"},
     "dtype": "uint16" | "int32",
     "split": {"name": "train" | "validation" | "test", "validation_fraction", "rule"},
     "shards": [{"name", "tokens", "documents", "bytes", "sha256", "index_sha256"}, ...],
     "sources": [{"path", "bytes", "sha256"}, ...],
     "totals": {"documents", "tokens", "text_bytes", ...},
     "preparation": {...},                      the options that made it, for a second run
     "sha256": ...}                             of the lines above

A corpus is of packed documents, each with its END-OF-DOCUMENT, or of records: samples of one length
without it. Either may have a mask, which tells the tokens that are scored as targets. Records and
masks are format 2, which earlier versions refuse:

    {"format": 2, ...,
     "records": {"length", "start"},            only of records: n_ctx + 1 tokens; the id that
                                                each begins with, where there is one
     "shards": [{..., "mask_sha256"}, ...]}     "" without a mask

Records may be ids that no tokenizer made: its name is "" then, and end_of_document -1. Records of
images begin with Image GPT's start vector, the id behind a palette's colours, and the palette is
their tokenizer.json.

A shard called `web_00000` is the pair `web_00000.bin` and `web_00000.idx` in the same folder, and
`web_00000.mask`, where there are masks.
When the tokenizer is a file, its name is `tokenizer.json`, a copy in the folder, with its sha256.
Manifests of earlier versions lack both checksums; they are read, and `data verify` says so.
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
from megagpt.files import file_sha256, sealed_json, write_durably
from megagpt.tokenizer import end_of_document, fingerprint, load_tokenizer, token_dtype
from megagpt.tokenizer.palette import Palette
from megagpt.tokenizer.portable import FILE

if TYPE_CHECKING:
    import tiktoken

FORMATS = (1, 2)
MANIFEST = "manifest.json"
KEYS = {
    "format", "tokenizer", "dtype", "split", "records", "shards", "sources", "totals",
    "preparation", "sha256",
}  # fmt: skip
BROKEN = (ValueError, KeyError, TypeError, AttributeError)
"""What parsing an object of another shape raises."""
SPLIT_RULE = (
    "a document belongs to validation when blake2b(UTF-8 text) with a digest of 8 bytes, read as a "
    "little-endian integer, is below validation_fraction * 2^64"
)

PREPARE = (
    "prepare a corpus there, by the command that a run file of launch/runs names in its first "
    "lines, or with data_prep/tokenize_corpus.py"
)
"""The remedy where there is no corpus."""


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
    tokenizer_name: str = ""
    """A name for `load_tokenizer`, or `tokenizer.json`: see `tokenizer`; "": no tokenizer."""
    vocab_size: int
    end_of_document: int = -1
    """-1: there is none, which only records may have."""
    fingerprint: str = ""
    """`megagpt.tokenizer.fingerprint` of the encoding; empty when an import did not know it."""
    tokenizer_sha256: str = ""
    """Of the copy in the folder; empty for a name, and in manifests of earlier versions."""
    sealed: bool = True
    """Whether manifest.json carries a checksum of itself; those of earlier versions do not."""
    dtype: np.dtype
    record_length: int = 0
    """Tokens of each record; 0: documents are packed."""
    record_start: int = -1
    """The id that each record begins with and holds nowhere else; -1: there is none."""
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
    def ids(self) -> int:
        """Ids that a token may have: the vocabulary's, and the one that records begin with."""
        return self.vocab_size + (self.record_start >= 0)

    @property
    def masked(self) -> bool:
        """Whether a mask tells which tokens are targets."""
        return any(shard.mask_sha256 for shard in self.shards)

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

    def mask_path(self, shard: Shard) -> Path:
        """The mask of a shard, where it has one."""
        return self.folder / f"{shard.name}.mask"

    def files(self, shard: Shard) -> list[tuple[Path, int | None, str]]:
        """(path, bytes, sha256) of each file of a shard; None for a size that is not told."""
        found: list[tuple[Path, int | None, str]] = [
            (self.bin_path(shard), shard.bytes, shard.sha256),
            (self.index_path(shard), None, shard.index_sha256),
        ]
        if shard.mask_sha256:
            found.append((self.mask_path(shard), shard.tokens, shard.mask_sha256))
        return found


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
        # Earlier versions wrote names of files that are not UTF-8 as they are.
        text = content.decode("utf-8", "surrogateescape")
        data = json.loads(text)
        if "sha256" in data and text != sealed_json(data):
            raise ValueError("its checksum is not that of its content: damaged or edited")
        if data["format"] not in FORMATS:
            raise UsageError(
                f"{path}: format {data['format']}, this megagpt reads formats 1 and 2; use the "
                "version that wrote it or prepare the corpus again"
            )
        manifest = _parse(folder, data)
        problem = _contradiction(manifest)
    except (*BROKEN, OverflowError, RecursionError) as error:
        raise DamageError(
            f"{path}: not a manifest that can be believed ({type(error).__name__}: {error}); "
            "prepare or copy the corpus again"
        ) from None
    if problem:
        raise DamageError(f"{path}: {problem}; prepare or copy the corpus again")
    return manifest


def _missing(folder: Path) -> str:
    """Why there is no manifest, and what to do."""
    if not folder.exists():
        return f"{folder} does not exist; {PREPARE}"
    if (folder / ".preparation").is_dir():
        return (
            f"{folder}: its preparation did not finish; run the same command again (of data_prep, "
            "which continues where it stopped, or megagpt data import, which starts over)"
        )
    if any(folder.glob("*.bin")):
        return (
            f"{folder} holds .bin files but no {MANIFEST}; `megagpt data import {folder}` writes "
            "one for Megatron, nanoGPT and llm.c files"
        )
    return f"{folder} holds no {MANIFEST}; {PREPARE}"


def _parse(folder: Path, data: dict[str, Any]) -> CorpusManifest:
    """The dataclass of the JSON object. Raises KeyError, TypeError or ValueError."""
    tokenizer = data["tokenizer"]
    if strange := sorted(data.keys() - KEYS):
        raise ValueError(f"no key of a manifest is called {strange[0]!r}")
    totals = data.get("totals", {})
    counts = (totals.get("text_bytes", 0), *totals.get("left_out", {}).values())
    if any(type(count) is not int for count in counts):
        raise TypeError(f"totals {totals!r:.200} are no counts")
    if data["dtype"] not in ("uint16", "int32"):
        raise ValueError(f"dtype {data['dtype']!r} is neither uint16 nor int32")
    return CorpusManifest(
        folder=folder,
        tokenizer_name=str(tokenizer["name"]),
        vocab_size=int(tokenizer["vocab_size"]),
        end_of_document=int(tokenizer["end_of_document"]),
        fingerprint=str(tokenizer["fingerprint"]),
        tokenizer_sha256=str(tokenizer.get("sha256", "")),
        sealed="sha256" in data,
        dtype=np.dtype(data["dtype"]).newbyteorder("<"),
        record_length=int(data.get("records", {"length": 0})["length"]),
        record_start=int(data.get("records", {}).get("start", -1)),
        split=Subset(**data["split"]),
        shards=tuple(Shard(**shard) for shard in data["shards"]),
        sources=tuple(data.get("sources", ())),
        totals=dict(totals),
        preparation=dict(data.get("preparation", {})),
    )


def _contradiction(manifest: CorpusManifest) -> str | None:
    """What in the manifest contradicts itself."""
    if manifest.dtype != token_dtype(manifest.vocab_size):
        return f"dtype {manifest.dtype} does not follow from {manifest.vocab_size} tokens"
    lowest = -1 if manifest.record_length else 0
    if not lowest <= manifest.end_of_document < manifest.vocab_size:
        return f"end_of_document {manifest.end_of_document} is outside the vocabulary"
    if Path(manifest.tokenizer_name).name != manifest.tokenizer_name:
        return f"tokenizer {manifest.tokenizer_name!r} is neither a name nor a file in the folder"
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) < len(names):
        return "it lists a shard twice"
    for shard in manifest.shards:
        if shard.bytes != shard.tokens * manifest.dtype.itemsize:
            return f"shard {shard.name}: {shard.bytes} bytes are not {shard.tokens} tokens"
        if Path(shard.name).name != shard.name:
            return f"shard {shard.name!r} is not a file name"
    for key, count in (("tokens", manifest.tokens), ("documents", manifest.documents)):
        if manifest.totals.get(key, count) != count:
            return f"totals say {manifest.totals[key]} {key}, the shards hold {count}"
    return _unlike_records(manifest)


def _unlike_records(manifest: CorpusManifest) -> str | None:
    """What contradicts itself in what is said of records and masks."""
    length, masked = manifest.record_length, manifest.masked
    if length and length < 2:
        return f"records of {length} tokens have no target"
    if manifest.record_start not in (-1, manifest.vocab_size if length else -1):
        return f"records begin with {manifest.record_start}, which is not behind the vocabulary"
    for shard in manifest.shards:
        if length and shard.tokens != shard.documents * length:
            return f"shard {shard.name}: {shard.tokens} tokens are no records of {length}"
        if bool(shard.mask_sha256) != masked:
            return f"shard {shard.name} has no mask, though others have one"
    return None


def new_manifest(
    folder: Path,
    tokenizer: str,
    made: tiktoken.Encoding | Palette | int,
    shards: Sequence[Shard],
    **more: Any,
) -> CorpusManifest:
    """The manifest of shards whose ids `made` gave: an encoding, a palette, or so many ids that
    stand for no text; `more` are the other fields. `tokenizer` is what `load_tokenizer` took: a
    file of it is copied into the folder."""
    if isinstance(made, int):
        more |= {"vocab_size": made}
    elif isinstance(made, Palette):
        write_durably(folder / FILE, made.text.encode())
        more |= {"tokenizer_name": FILE, "vocab_size": made.size, "record_start": made.size}
        more |= {"fingerprint": made.fingerprint, "tokenizer_sha256": file_sha256(folder / FILE)}
    else:
        more |= {"tokenizer_name": made.name, "vocab_size": made.n_vocab}
        more |= {"end_of_document": end_of_document(made), "fingerprint": fingerprint(made)}
        path = Path(tokenizer) / FILE if Path(tokenizer).is_dir() else Path(tokenizer)
        if made.name not in ("gpt2", "bytes") and path.is_file():
            write_durably(folder / FILE, path.read_bytes())
            # The file may have changed since it was loaded, which a long preparation ends with.
            load_tokenizer(folder / FILE, more["fingerprint"])
            more |= {"tokenizer_name": FILE, "tokenizer_sha256": file_sha256(folder / FILE)}
    counts = {name: sum(getattr(s, name) for s in shards) for name in ("documents", "tokens")}
    more |= {"totals": counts | more.get("totals", {}), "dtype": token_dtype(more["vocab_size"])}
    return CorpusManifest(folder=folder, shards=tuple(shards), **more)


def write_manifest(manifest: CorpusManifest) -> None:
    """Write manifest.json, whole or not at all; it is the last file of a preparation.

    A corpus that format 1 can describe is of format 1, for the versions that know no other.
    """
    length, start = manifest.record_length, manifest.record_start
    records = {"length": length} | ({"start": start} if start >= 0 else {})
    shards = [asdict(shard) for shard in manifest.shards]
    data = {
        "format": 2 if length or manifest.masked else 1,
        "tokenizer": {
            "name": manifest.tokenizer_name,
            "vocab_size": manifest.vocab_size,
            "end_of_document": manifest.end_of_document,
            "fingerprint": manifest.fingerprint,
            "sha256": manifest.tokenizer_sha256,
        },
        "dtype": manifest.dtype.name,
        "split": asdict(manifest.split),
        **({"records": records} if length else {}),
        # Of a mask only where there are some.
        "shards": [{k: v for k, v in one.items() if v or k != "mask_sha256"} for one in shards],
        "sources": list(manifest.sources),
        "totals": manifest.totals,
        "preparation": manifest.preparation,
    }
    write_durably(manifest.folder / MANIFEST, sealed_json(data).encode())

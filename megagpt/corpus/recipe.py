"""How to prepare a corpus: the options, and which of them decide the bytes of the shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.corpus.documents import FORMATS, Inputs, find_sources
from megagpt.corpus.duplicates import bands_for
from megagpt.corpus.manifest import Subset
from megagpt.corpus.shards import SHARD_TOKENS
from megagpt.corpus.unit import UNIT_BYTES
from megagpt.errors import UsageError
from megagpt.files import file_sha256
from megagpt.tokenizer import fingerprint

if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How to prepare a corpus."""

    output: Path
    """The folder of the train split; validation goes to OUTPUT-validation beside it."""
    tokenizer: str = "gpt2"
    text_field: str = "text"
    """Field of JSON objects and column of Parquet files that holds the text."""
    format: str | None = None
    """text, jsonl, json or parquet for every file, whatever its ending."""
    workers: int = 0
    """Processes; 0 means one for each core."""
    validation_fraction: float = 0.0
    """Share of documents that goes to validation, chosen by a hash of the text."""
    validation_by_place: bool = False
    """Take that share off the end of each text instead."""
    split: Subset | None = None
    """What `output` holds, where the inputs have been split before."""
    shard_tokens: int = SHARD_TOKENS
    deduplicate: bool = False
    near_duplicates: float = 0.0
    """Jaccard similarity of which 95% of near-copies go; 0 keeps all."""
    hashes: int = 128
    """MinHash hashes of a document."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation files whose 13-grams are removed; the inputs are read twice."""
    strict: bool = False
    """Stop at the first document that has to be left out."""
    backend: str = "auto"
    unit_bytes: int = UNIT_BYTES


def check_options(options: PrepareOptions) -> None:
    """Raises UsageError for a value that no preparation can have."""
    for name, low, high in (
        ("validation_fraction", 0, 1),
        ("near_duplicates", 0, 1),
        ("workers", 0, 4096),
        ("hashes", 2, 4096),
        ("unit_bytes", 1, 1 << 40),
    ):
        value = getattr(options, name)
        if not low <= value <= high:
            raise UsageError(f"{name} = {value}: must lie between {low} and {high}")
    if not 1 <= options.shard_tokens <= 1 << 40:
        raise UsageError(f"shard_tokens = {options.shard_tokens}: must lie between 1 and 2^40")
    if options.validation_by_place and not options.validation_fraction:
        raise UsageError(
            "validation_by_place: needs validation_fraction, the share at the end of each text"
        )
    if options.format and options.format not in FORMATS:
        raise UsageError(f"format {options.format}: must be one of {', '.join(FORMATS)}")


def check_inputs(options: PrepareOptions, inputs: Inputs) -> None:
    """Raises UsageError for inputs that cannot be prepared like this."""
    if not inputs.sources:
        why = [f"; {path}: {reason} ({detail})" for path, reason, detail in inputs.problems[:3]]
        raise UsageError(
            "the inputs hold no file to tokenize; see --format for unusual endings" + "".join(why)
        )
    if any(source.path == "-" and source.format == "parquet" for source in inputs.sources):
        raise UsageError(
            "input -: Parquet is read in any order, which standard input does not allow; write it "
            "to a file and give that"
        )
    paths = [source.path for source in inputs.sources]
    if options.decontaminate and "-" in (*paths, *options.decontaminate):
        raise UsageError(
            "input -: decontamination reads its input twice, which standard input does not allow; "
            "write it to a file, which may be compressed, and give that"
        )


def recipe_of(options: PrepareOptions, encoding: tiktoken.Encoding) -> dict[str, Any]:
    """All options that decide the bytes of the shards."""
    near = options.near_duplicates
    recipe: dict[str, Any] = {
        "tokenizer": fingerprint(encoding),
        "text_field": options.text_field,
        "format": options.format or "by ending",
        "shard_tokens": options.shard_tokens,
        "validation_fraction": options.validation_fraction,
        "deduplicate": options.deduplicate,
        "near_duplicates": near,
        "hashes": options.hashes if near else 0,
        "decontaminate": [
            [source.path, file_sha256(Path(source.path))]
            for source in find_sources(options.decontaminate).sources
        ],
    }
    # Corpora of earlier versions have no such keys; those with near-duplicates are others.
    if near:
        recipe["bands"] = list(bands_for(near, options.hashes))
    return recipe | ({"validation_by_place": True} if options.validation_by_place else {})

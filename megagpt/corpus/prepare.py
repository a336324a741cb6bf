"""A corpus of any size into verified shards: `prepare(inputs, options)`.

    python data_prep/tokenize_corpus.py INPUT... --output DIR

1) Inputs become units of about 8 MB, by the input alone (source.py).
2) Worker processes make a part of each: read, parse, encode, write; neither text nor tokens of
   files travel between processes (unit.py, part.py, pool.py).
3) This process joins the parts in order into shards (assembly.py, writer.py), so the bytes are
   the same for any number of workers.
4) The manifest comes last. A killed run continues: parts and flushed shards stay (state.py).

A decontamination reads the inputs once before, to know common phrases (counting.py).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megagpt.corpus.assembly import Assembly, Digests, collapsed
from megagpt.corpus.clean import Seen, Similar
from megagpt.corpus.contamination import Hashes, evaluation_grams
from megagpt.corpus.counting import rare_grams
from megagpt.corpus.flow import flow
from megagpt.corpus.manifest import MANIFEST, Manifest, Shard, Split, read_manifest, write_manifest
from megagpt.corpus.part import PartJob, Settings
from megagpt.corpus.pool import FULL, Pool, full_disk
from megagpt.corpus.progress import Progress
from megagpt.corpus.shards import token_dtype
from megagpt.corpus.source import (
    FORMATS,
    UNIT_BYTES,
    Documents,
    Inputs,
    Source,
    Unit,
    find_sources,
    plan_units,
)
from megagpt.corpus.state import FOLDER, State, plan_difference, source_plan
from megagpt.corpus.summary import Summary
from megagpt.corpus.writer import SHARD_TOKENS, ShardWriter
from megagpt.errors import Stopped, UsageError
from megagpt.files import file_sha256, write_durably
from megagpt.tokenizer import end_of_document, fingerprint, load_tokenizer
from megagpt.tokenizer.encoder import Encoder

if TYPE_CHECKING:
    import tiktoken

log = logging.getLogger("megagpt.data")


@dataclass(frozen=True, kw_only=True)
class Options:
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
    split: Split | None = None
    """What `output` holds, where the inputs have been split before."""
    shard_tokens: int = SHARD_TOKENS
    deduplicate: bool = False
    near_duplicates: float = 0.0
    """Jaccard similarity from which a document is a near-copy; 0 keeps all."""
    hashes: int = 128
    """MinHash hashes of a document."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation files whose 13-grams are removed; the inputs are read twice."""
    strict: bool = False
    """Stop at the first document that has to be left out."""
    backend: str = "auto"
    unit_bytes: int = UNIT_BYTES


def validation_folder(output: Path) -> Path:
    """Where the validation split of a corpus goes."""
    return output.with_name(output.name + "-validation")


def prepare(inputs: Iterable[str | Path | Documents], options: Options) -> Summary:
    """Tokenize `inputs` into shards in `options.output`.

    Continues a killed run; does nothing when the output is finished. Raises UsageError for wrong
    options, inputs or an output that holds something else, DamageError in strict mode, Stopped for
    SIGINT, and MegagptError when the disk is full or a worker died.
    """
    try:
        return _prepare(inputs, options)
    except KeyboardInterrupt:
        raise Stopped(
            f"{options.output}: stopped; run the same command again to continue"
        ) from None


def _prepare(inputs: Iterable[str | Path | Documents], options: Options) -> Summary:
    t0 = time.monotonic()
    _check_options(options)
    encoding = load_tokenizer(options.tokenizer)
    found = find_sources(inputs, options.format)
    if not found.sources:
        raise UsageError("the inputs hold no file to tokenize; see --format for unusual endings")
    paths = [source.path for source in found.sources]
    if options.decontaminate and "-" in (*paths, *options.decontaminate):
        raise UsageError(
            "input -: decontamination reads its input twice, which standard input does not allow; "
            "write it to a file, which may be compressed, and give that"
        )
    recipe = _recipe(options, encoding)
    summary = _finished(options, found.sources, recipe)
    if summary is None:
        job = _Job(options, encoding, found, recipe)
        summary = job.run()
        summary.elapsed_s = time.monotonic() - t0
    return summary


def _check_options(options: Options) -> None:
    for name, value, low, high in (
        ("validation_fraction", options.validation_fraction, 0, 1),
        ("near_duplicates", options.near_duplicates, 0, 1),
        ("workers", options.workers, 0, 4096),
        ("hashes", options.hashes, 2, 4096),
        ("unit_bytes", options.unit_bytes, 1, 1 << 40),
    ):
        if not low <= value <= high:
            raise UsageError(f"{name} = {value}: must lie between {low} and {high}")
    if options.format and options.format not in FORMATS:
        raise UsageError(f"format {options.format}: must be one of {', '.join(FORMATS)}")


def _recipe(options: Options, encoding: tiktoken.Encoding) -> dict[str, Any]:
    """All options that decide the bytes of the shards."""
    return {
        "tokenizer": fingerprint(encoding),
        "text_field": options.text_field,
        "format": options.format or "by ending",
        "shard_tokens": options.shard_tokens,
        "validation_fraction": options.validation_fraction,
        "deduplicate": options.deduplicate,
        "near_duplicates": options.near_duplicates,
        "hashes": options.hashes if options.near_duplicates else 0,
        "decontaminate": [
            [source.path, file_sha256(Path(source.path))]
            for source in find_sources(options.decontaminate).sources
        ],
    }


def _finished(options: Options, sources: list[Source], recipe: dict[str, Any]) -> Summary | None:
    """A summary when the output is this very corpus; None when it is still to be made."""
    output = options.output
    if not (output / MANIFEST).exists():
        return None
    manifest = read_manifest(output)
    difference = plan_difference(manifest.preparation, recipe) if manifest.preparation else "other"
    if difference == "nothing" and not _same_sources(manifest, sources):
        difference = "the input files differ or have changed"
    if difference != "nothing":
        raise UsageError(
            f"{output} already holds another corpus ({difference}); choose another --output, or "
            "remove it first"
        )
    shutil.rmtree(output / FOLDER, ignore_errors=True)  # killed just before its end
    summary = Summary(folders=(output,), finished_before=True)
    manifests = [manifest]
    if options.validation_fraction:
        manifests.append(read_manifest(validation_folder(output)))
    summary.documents = [each.documents for each in manifests]
    summary.tokens = [each.tokens for each in manifests]
    return summary


def _same_sources(manifest: Manifest, sources: list[Source]) -> bool:
    """Path and size of each; the content of those that are newer than the manifest."""
    written = (manifest.folder / MANIFEST).stat().st_mtime_ns
    known = {entry["path"]: entry["sha256"] for entry in manifest.sources}
    entries = []
    for source in sources:
        digest = known.get(source.path, "")
        if (source.mtime_ns > written or not digest) and source.mtime_ns:
            digest = file_sha256(Path(source.path))
        entries.append({"path": source.path, "bytes": source.bytes, "sha256": digest})
    entries = collapsed(entries)
    sized = [
        {**entry, "bytes": mine["bytes"] or entry["bytes"]}
        for entry, mine in zip(manifest.sources, entries, strict=False)
    ]
    mine_sized = [
        {**mine, "bytes": mine["bytes"] or entry["bytes"]}
        for entry, mine in zip(manifest.sources, entries, strict=False)
    ]
    return len(entries) == len(manifest.sources) and sized == mine_sized


class _Job:
    """One run of `prepare` over an output that is not finished."""

    def __init__(
        self,
        options: Options,
        encoding: tiktoken.Encoding,
        found: Inputs,
        recipe: dict[str, Any],
    ) -> None:
        self._options, self._encoding = options, encoding
        self._found, self._recipe = found, recipe
        self._folders = [options.output]
        if options.validation_fraction:
            self._folders.append(validation_folder(options.output))
        plan = {**recipe, "sources": source_plan(found.sources), "unit_bytes": options.unit_bytes}
        self._state = State(self._folders, plan)
        self._spared = 0
        """13-grams of evaluation files that are common phrases."""

    def run(self) -> Summary:
        try:
            return self._run()
        except OSError as error:
            if error.errno in FULL:
                raise full_disk(error, self._options.output) from None
            raise
        finally:
            self._state.release()

    def _run(self) -> Summary:
        options = self._options
        for folder in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(self._encoding, options.backend)
        pool = Pool(_workers(options.workers), PartJob(self._settings(), encoder))
        self._digests = digests = Digests(self._found.sources)  # its thread starts after the fork
        progress = Progress("tokenizing", sum(source.bytes for source in self._found.sources))
        try:
            assembly = self._assembly()
            self._report_inputs(assembly)
            units = plan_units(self._found.sources, options.unit_bytes)
            count = 0
            for unit in flow(units, pool, self._done):
                resumed = unit.number < self._state.units
                part = assembly.take(unit)
                count = unit.number + 1
                # Of standard input and iterators only the text is known.
                size = unit.size or int(part.bytes.sum())
                if resumed:
                    progress.skip(size)
                else:
                    progress.add(size, int(part.sizes.sum()))
            assembly.flush(max(count, self._state.units))
            summary = assembly.summary
            self._write_manifests(summary, self._writers, digests.entries())
        finally:
            progress.close()
            digests.close()
            pool.close()
        summary.backend = encoder.backend if not pool.notes else "tiktoken"
        summary.messages = sorted({*pool.notes, *([encoder.note] if encoder.note else [])})
        return summary

    def _done(self, unit: Unit) -> bool:
        """Whether an earlier run has made the part; the unit is about to be worked on."""
        self._digests.take(unit)
        # Where the first pass has read it, the second must read the same.
        if self._options.decontaminate and not self._state.done(unit, "grams"):
            raise self._state.other_input()
        return self._state.done(unit)

    def _rare_grams(self) -> Hashes:
        options = self._options
        if not options.decontaminate:
            return np.zeros(0, np.uint64)
        grams = evaluation_grams(options.decontaminate, options.text_field)
        rare = rare_grams(
            grams,
            self._found.sources,
            self._state,
            text_field=options.text_field,
            workers=_workers(options.workers),
            unit_bytes=options.unit_bytes,
        )
        self._spared = len(grams) - len(rare)
        return rare

    def _settings(self) -> Settings:
        options = self._options
        return Settings(
            folder=self._state.folder,
            text_field=options.text_field,
            validation_fraction=options.validation_fraction,
            hashed=options.deduplicate,
            minhashes=options.hashes if options.near_duplicates else 0,
            grams=self._rare_grams(),
        )

    def _assembly(self) -> Assembly:
        options = self._options
        self._writers = [
            ShardWriter(
                folder,
                self._encoding.n_vocab,
                shard_tokens=options.shard_tokens,
                finished=finished,
            )
            for folder, finished in zip(self._folders, self._state.finished, strict=True)
        ]
        near = options.near_duplicates
        return Assembly(
            self._state,
            self._writers,
            self._found.sources,
            duplicates=Seen() if options.deduplicate else None,
            similar=Similar(near, options.hashes) if near else None,
            strict=options.strict,
        )

    def _report_inputs(self, assembly: Assembly) -> None:
        for path in self._found.twice:
            assembly.report("file given more than once", path, "")
            assembly.summary.left_out["file given more than once"] += 1
        if self._found.others:
            assembly.summary.notes["files of folders with an unknown ending"] = self._found.others
        if self._spared:
            assembly.summary.notes["13-grams of evaluation files left as common"] = self._spared

    def _write_manifests(
        self, summary: Summary, writers: list[ShardWriter], sources: list[dict[str, Any]]
    ) -> None:
        if not sum(summary.documents):
            reasons = ", ".join(f"{key} {n}" for key, n in sorted(summary.left_out.items()))
            self._state.remove()
            raise UsageError(f"no document is left to write ({reasons or 'the inputs are empty'})")
        shards = [writer.close() for writer in writers]
        # Train last: its manifest says that everything is there.
        for place in reversed(range(len(writers))):
            write_manifest(self._manifest(place, summary, shards[place], sources))
        self._state.remove()

    def _manifest(
        self, place: int, summary: Summary, shards: list[Shard], sources: list[dict[str, Any]]
    ) -> Manifest:
        folder, name = self._folders[place], self._encoding.name
        path = Path(self._options.tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if name not in ("gpt2", "bytes") and path.is_file():
            write_durably(folder / "tokenizer.json", path.read_bytes())
            name = "tokenizer.json"
        totals: dict[str, Any] = {
            "documents": summary.documents[place],
            "tokens": summary.tokens[place],
            "text_bytes": summary.text_bytes[place],
        }
        if place == 0:
            totals["left_out"] = dict(sorted(summary.left_out.items()))
            totals["longest_document_tokens"] = summary.longest_tokens
        return Manifest(
            folder=folder,
            tokenizer_name=name,
            vocab_size=self._encoding.n_vocab,
            end_of_document=end_of_document(self._encoding),
            fingerprint=self._recipe["tokenizer"],
            dtype=token_dtype(self._encoding.n_vocab),
            split=self._options.split
            or Split(("train", "validation")[place], self._options.validation_fraction),
            shards=tuple(shards),
            sources=tuple(sources),
            totals=totals,
            preparation=self._recipe,
        )


def _workers(workers: int) -> int:
    return workers or len(os.sched_getaffinity(0))

"""A corpus of any size into verified shards: `prepare(inputs, options)`.

    python data_prep/tokenize_corpus.py INPUT... --output DIR

1) Inputs become units of about 8 MB, by the input alone (documents.py, unit.py).
2) Worker processes make a part of each: read (texts.py), clean, encode, write (part.py); neither
   text nor tokens of files travel between processes (workers.py).
3) This process takes the parts in order: it keeps or drops each document (duplicates.py), adds it
   to the shards (shards.py), flushes them and remembers how far it is (unfinished.py). So the
   bytes are the same for any number of workers, and a killed run decides the same again from the
   parts.
4) The manifest comes last (manifest.py).

A decontamination reads the inputs once before, to know common phrases (contamination.py).
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megagpt.corpus.contamination import rare_grams
from megagpt.corpus.digests import Digests, made_of
from megagpt.corpus.documents import Documents, Inputs, Source, find_sources, total_bytes
from megagpt.corpus.duplicates import Duplicates
from megagpt.corpus.manifest import (
    MANIFEST,
    SPLIT_RULE,
    Subset,
    new_manifest,
    read_manifest,
    write_manifest,
)
from megagpt.corpus.part import Part, PartMaker, read_part
from megagpt.corpus.progress import Progress
from megagpt.corpus.recipe import PrepareOptions, check_inputs, check_options, recipe_of
from megagpt.corpus.shards import ShardWriter
from megagpt.corpus.summary import Summary
from megagpt.corpus.unfinished import FOLDER, State, beside, plan_difference, source_plan, unit_path
from megagpt.corpus.unit import Unit, plan_units
from megagpt.corpus.workers import Workers
from megagpt.errors import FULL, DamageError, MegagptError, Stopped, UsageError
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.encoder import Encoder

if TYPE_CHECKING:
    import tiktoken

BY_PLACE = "the last validation_fraction of the characters of each text, as a document of its own"
FLUSH_UNITS = 32
"""Units between two flushes: what a killed run may have to add to the shards again."""


def validation_folder(output: Path) -> Path:
    """Where the validation split of a corpus goes."""
    return beside(output, "-validation")


def prepare(inputs: Iterable[str | Path | Documents], options: PrepareOptions) -> Summary:
    """Tokenize `inputs` into shards in `options.output`.

    Continues a killed run; does nothing when the output is finished. Raises UsageError for wrong
    options, inputs or an output that holds something else, DamageError in strict mode, Stopped for
    SIGINT, and MegagptError when the disk is full or a worker died.
    """
    output = options.output
    t0 = time.monotonic()
    try:
        check_options(options)
        encoding = load_tokenizer(options.tokenizer)
        found = find_sources(inputs, options.format)
        check_inputs(options, found)
        recipe = recipe_of(options, encoding)
        summary = _finished(options, found.sources, recipe)
        if summary is None:
            summary = _Pipe(options, encoding, found, recipe).run()
            summary.elapsed_s = time.monotonic() - t0
        return summary
    except KeyboardInterrupt:
        raise Stopped(f"{output}: stopped; run the same command again to continue") from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise MegagptError(
            f"{output}: {error.strerror}; make space and run the same command again, it continues "
            "where it stopped"
        ) from None


def _finished(
    options: PrepareOptions, sources: list[Source], recipe: dict[str, Any]
) -> Summary | None:
    """A summary when the output is this very corpus; None when it is still to be made."""
    output = options.output
    if not (output / MANIFEST).exists():
        return None
    manifest = read_manifest(output)
    difference = plan_difference(manifest.preparation, recipe) if manifest.preparation else "other"
    if difference == "nothing" and not made_of(manifest, sources):
        difference = "the input files differ or have changed"
    if difference != "nothing":
        raise UsageError(
            f"{output} already holds another corpus ({difference}); choose another --output, or "
            "remove it first"
        )
    for folder in (validation_folder(output), output):
        shutil.rmtree(folder / FOLDER, ignore_errors=True)  # killed just before its end
    manifests = [manifest]
    if options.validation_fraction:
        manifests.append(read_manifest(validation_folder(output)))
    return Summary(
        folders=(output,),
        finished_before=True,
        documents=[each.documents for each in manifests],
        tokens=[each.tokens for each in manifests],
    )


class _Pipe:
    """One run of `prepare` over an output that is not finished."""

    def __init__(
        self,
        options: PrepareOptions,
        encoding: tiktoken.Encoding,
        inputs: Inputs,
        recipe: dict[str, Any],
    ) -> None:
        # macOS does not tell which cores a process may use.
        here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options = replace(options, workers=options.workers or here or 1)
        self._options, self._encoding, self._recipe = options, encoding, recipe
        self._inputs, self._sources = inputs, inputs.sources
        both = (options.output, validation_folder(options.output))
        self._folders = both if options.validation_fraction else both[:1]
        self._summary = Summary(self._folders, options.strict, options.validation_fraction)
        self._duplicates = Duplicates(options.deduplicate, options.near_duplicates, options.hashes)
        self._first_item: Counter[int] = Counter()
        """Lines, rows or elements of each source in the parts so far."""

    def run(self) -> Summary:
        """Prepare, or continue where a killed run was."""
        options, sources = self._options, source_plan(self._sources)
        plan = {**self._recipe, "sources": sources, "unit_bytes": options.unit_bytes}
        with State(self._folders, plan) as self._state:
            grams = rare_grams(self._sources, self._state, options, self._summary.notes)
            encoder = Encoder(self._encoding, options.backend)
            size, most = self._encoding.n_vocab, options.shard_tokens
            self._writers = [
                ShardWriter(folder, size, shard_tokens=most, finished=finished)
                for folder, finished in zip(self._folders, self._state.finished, strict=True)
            ]
            self._summary.describe_inputs(self._inputs)
            self._resumed = self._state.units
            self._work(PartMaker(self._state.folder, options, grams, encoder))
        return self._summary

    def _work(self, maker: PartMaker) -> None:
        options, state, summary = self._options, self._state, self._summary
        # The workers first: what follows may start threads.
        with (
            Workers(options.workers, maker) as workers,
            Digests(self._sources) as digests,
            Progress("tokenizing", total_bytes(self._sources)) as progress,
        ):

            def is_done(unit: Unit) -> bool:
                digests.take(unit)
                # Where the first pass has read it, the second must read the same.
                if options.decontaminate and not state.is_done(unit, "grams"):
                    raise state.other_input()
                return state.is_done(unit)

            count = 0
            for unit in workers.in_order(plan_units(self._sources, options.unit_bytes), is_done):
                part = read_part(unit_path(state.folder, unit.number, "doc"))
                self._take(unit, part)
                count = unit.number + 1
                if count - state.units >= FLUSH_UNITS:
                    self._flush(count)
                # Of standard input and iterators only the text is known.
                known = self._sources[unit.sources[0]].bytes
                size = unit.size if known else int(part.bytes.sum())
                if count <= self._resumed:
                    progress.skip(size)
                else:
                    progress.add(size, int(part.sizes.sum()))
            self._flush(max(count, state.units))
            self._write_manifests(digests.entries())
        summary.backend = "tiktoken" if any(workers.notes) else maker.encoder.backend
        summary.messages = sorted({*workers.notes, maker.encoder.note} - {""})

    # --- parts in order -------------------------------------------------------------------------

    def _take(self, unit: Unit, part: Part) -> None:
        """Keep or drop the documents of a part, and add them to the shards."""
        summary = self._summary
        for item, reason, detail, path in part.problems:
            summary.describe(reason, path or self._place(unit, item), detail)
        keep, gone = self._duplicates.keep(part.hashes, part.signatures)
        summary.left_out.update(part.counts)
        summary.left_out.update(gone)
        summary.notes.update(part.notes)
        self._add(unit, part, keep)
        sizes = np.where(keep, part.sizes, 0)
        if len(sizes) and int(sizes.max()) > summary.longest_tokens:
            longest = int(np.argmax(sizes))
            summary.longest_tokens = int(sizes[longest])
            summary.longest_place = self._place(unit, int(part.items[longest]))
        if len(unit.sources) == 1:
            self._first_item[unit.sources[0]] += part.n_items

    def _place(self, unit: Unit, item: int) -> str:
        """file:line of an item, or the file that it is."""
        if unit.kind == "files":
            return unit.files[item][0]
        source = self._sources[unit.sources[0]]
        number = self._first_item[unit.sources[0]] + item + 1
        if source.format == "jsonl":
            name = "standard input" if source.path == "-" else source.path
            return f"{name}:{number}"
        return f"{source.path}: document {number}"

    def _add(self, unit: Unit, part: Part, keep: npt.NDArray[np.bool_]) -> None:
        """Add the documents that stay to the shards of their split."""
        summary = self._summary
        tokens = None
        for split, writer in enumerate(self._writers):
            chosen = keep & (part.validation == split)
            sizes = part.sizes[chosen]
            if not len(sizes):
                continue
            summary.documents[split] += len(sizes)
            summary.tokens[split] += int(sizes.sum())
            summary.text_bytes[split] += int(part.bytes[chosen].sum())
            if unit.number < self._resumed:
                writer.skip(sizes)
                continue
            if tokens is None:
                tokens = self._tokens(unit, part, writer.dtype)
            writer.add(tokens if chosen.all() else tokens[np.repeat(chosen, part.sizes)], sizes)

    def _tokens(self, unit: Unit, part: Part, dtype: np.dtype) -> npt.NDArray:
        path = unit_path(self._state.folder, unit.number, "bin")
        tokens: npt.NDArray
        try:
            tokens = np.memmap(path, dtype=dtype, mode="r")
        except (OSError, ValueError):
            tokens = np.zeros(0, dtype)
        if len(tokens) != int(part.sizes.sum()):
            raise DamageError(
                f"{path}: {len(tokens)} tokens, its .doc says {int(part.sizes.sum())}; remove "
                f"{self._options.output} and start again"
            )
        return tokens

    def _flush(self, units: int) -> None:
        """Put all shards on the disk and remember how far they are."""
        for writer in self._writers:
            writer.flush()
        self._state.save(units, [writer.shards for writer in self._writers])

    def _write_manifests(self, sources: list[dict[str, Any]]) -> None:
        summary, options = self._summary, self._options
        left_out = dict(sorted(summary.left_out.items()))
        if not sum(summary.documents):
            reasons = ", ".join(f"{key} {n}" for key, n in left_out.items())
            self._state.remove()
            raise UsageError(f"no document is left to write ({reasons or 'the inputs are empty'})")
        rule = BY_PLACE if options.validation_by_place else SPLIT_RULE
        more = {"left_out": left_out, "longest_document_tokens": summary.longest_tokens}
        shards = [writer.close() for writer in self._writers]
        # Train last: its manifest says that everything is there.
        for index in reversed(range(len(shards))):
            name = ("train", "validation")[index]
            manifest = new_manifest(
                self._folders[index],
                options.tokenizer,
                self._encoding,
                shards[index],
                split=options.split or Subset(name, options.validation_fraction, rule),
                sources=tuple(sources),
                totals={"text_bytes": summary.text_bytes[index]} | ({} if index else more),
                preparation=self._recipe,
            )
            write_manifest(manifest)
        self._state.remove()

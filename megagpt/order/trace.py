"""The documents that a step trains on, from the run file alone (L1).

    megagpt data batch launch/runs/quickstart.toml --step 12

Nothing of a run is needed: the schedule says which samples step S takes, the data order says which
windows they are, and the index of the shards says which documents lie in a window. Where the run
folder has recorded the step, its digest must agree.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megagpt.errors import DamageError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from megagpt.config import RunConfig
    from megagpt.order.loader import TokenLoader
    from megagpt.order.windows import TokenWindows

    Text = Callable[[np.ndarray], str]


class Span(NamedTuple):
    """The part of one document that lies in one window."""

    document: int
    """Number of the document in its source, from 0."""
    offset: int
    """Tokens of the document that come before the window."""
    start: int
    """Where in the window it begins, in tokens."""
    tokens: int
    """Tokens of the document in the window, its END-OF-DOCUMENT included."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample and what is in it."""

    number: int
    """From 0 at the start of the run."""
    source: Path
    """Folder of the corpus."""
    epoch: int
    """Times that the source was read to its end before."""
    window: int
    """Number of the window in the source."""
    tokens: np.ndarray
    """(n_ctx + 1,) of the corpus's dtype. The first is only read, the last is only predicted."""
    spans: tuple[Span, ...]


def trace(loader: TokenLoader, first: int, count: int) -> Iterator[Sample]:
    """The samples first ... first + count - 1 with their documents.

    Raises DamageError for a shard or index that is not what the manifest says.
    """
    n_ctx = loader.n_ctx
    places = loader.places(first, count)
    rows = zip(places.source.tolist(), places.draw.tolist(), places.window.tolist(), strict=True)
    for number, (source, draw, window) in enumerate(rows, first):
        store = loader.stores[source]
        yield Sample(
            number=number,
            source=store.folder,
            epoch=draw // store.n_windows(n_ctx),
            window=window,
            tokens=store.window(window, n_ctx),
            spans=tuple(spans(store, window * n_ctx, n_ctx + 1)),
        )


def spans(store: TokenWindows, first: int, count: int) -> Iterator[Span]:
    """The documents of tokens first ... first + count - 1 of a corpus.

    Binary search in the memory-mapped index: the cost does not grow with the corpus. Raises
    DamageError for an index that does not fit its shard.
    """
    import numpy as np

    shards = store.manifest.shards
    number = int(np.searchsorted(store.ends, first, side="right"))
    at, stop = first, first + count
    while at < stop:
        shard_end = int(store.ends[number])
        shard_first = shard_end - shards[number].tokens
        before = sum(shard.documents for shard in shards[:number])
        here = range(at - shard_first, min(stop, shard_end) - shard_first)
        for document, begin, end in _documents(store, number, here):
            start, last = max(begin, here.start), min(end, here.stop)
            yield Span(before + document, start - begin, shard_first + start - first, last - start)
        at = shard_first + here.stop
        number += 1


def _documents(store: TokenWindows, number: int, here: range) -> Iterator[tuple[int, int, int]]:
    """(number, first token, end) of the documents of a shard that hold tokens of `here`."""
    import numpy as np

    from megagpt.corpus.shards import read_index

    shard = store.manifest.shards[number]
    path = store.manifest.index_path(shard)
    index = read_index(path)
    # A document is one sequence in our own shards, and may be several in imported ones.
    sequence = np.searchsorted(index.pointers, here.start * store.dtype.itemsize, "right") - 1
    document = int(np.searchsorted(index.documents, sequence, "right")) - 1
    end = here.start
    while end < here.stop:
        if not 0 <= document < len(index.documents) - 1:
            raise DamageError(
                f"{path}: tells of no document at token {end} of its shard, which has "
                f"{shard.tokens}; run `megagpt data verify {store.folder}`"
            )
        first, last = (int(s) for s in index.documents[document : document + 2])
        begin = int(index.pointers[first]) // store.dtype.itemsize
        end = shard.tokens
        if last < len(index.pointers):
            end = int(index.pointers[last]) // store.dtype.itemsize
        if end > max(begin, here.start):
            yield document, begin, end
        document += 1


# --- the command --------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `batch` to the commands of `megagpt data`."""
    parser = subparsers.add_parser(
        "batch",
        help="the documents that a step trains on",
        description="Prints the documents of one training step: sample, source, document number, "
        "offset and length in tokens, text. They follow from the run file and the corpora alone; "
        "where the run folder has recorded the step, its digest must agree.",
        epilog="Exit codes: 0 done; 2 no such step, or the run trained it on other samples; "
        "3 damaged corpus.",
    )
    parser.add_argument("file", metavar="RUN", type=Path, help="run file (.toml) or run folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override of a key"
    )
    parser.add_argument(
        "--step",
        metavar="S",
        type=int,
        required=True,
        help="the step as metrics.jsonl counts, from 1",
    )
    parser.add_argument(
        "--characters",
        metavar="N",
        type=int,
        default=80,
        help="characters of text for each document; 0: all (default: 80)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for each document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints one step."""
    from megagpt.config import load_run
    from megagpt.order.loader import training_loader

    path = args.file / "config.toml" if args.file.is_dir() else args.file
    config = load_run(path, args.overrides)
    if not 1 <= args.step <= config.schedule.n_steps:
        raise UsageError(
            f"--step {args.step}: the run has the steps 1 to {config.schedule.n_steps:,}"
        )
    n_ctx = config.model.n_ctx
    tokens, size = config.schedule.position(args.step - 1)
    loader = training_loader(config)
    record, count = _record(config, args.step), size // n_ctx
    # A rollback may have skipped samples before this step.
    first = record["samples"] - count if "samples" in record else tokens // n_ctx
    digest = loader.digest(first, count)
    recorded = record.get("digest")
    if recorded not in (None, digest):
        raise UsageError(
            f"step {args.step} has digest {digest}, but {config.output} was trained with "
            f"{recorded}: the run file, the seed or the corpora are not what they were; restore "
            f"them, or look at {config.output}/config.toml"
        )
    text = _decoder(loader)
    if not args.json:
        seen = "as recorded by the run" if recorded else "not trained yet"
        print(
            f"step {args.step}: samples {first:,} to {first + count - 1:,}, {size:,} tokens, "
            f"digest {digest} ({seen})"
        )
    for sample in trace(loader, first, count):
        for line in (
            _json_lines(sample, text) if args.json else _lines(sample, text, args.characters)
        ):
            print(line)
    return 0


def _record(config: RunConfig, step: int) -> dict[str, Any]:
    """What the run folder's metrics.jsonl says of the step; {} where it says nothing."""
    from megagpt.log import read_metrics

    if not (Path(config.output) / "metrics.jsonl").is_file():
        return {}
    records = [r for r in read_metrics(config.output) if r.get("step") == step and "digest" in r]
    return records[-1] if records else {}


def _decoder(loader: TokenLoader) -> Text:
    """Tokens (N,) to text without END-OF-DOCUMENT; to ids where no tokenizer fits."""
    from megagpt.tokenizer import fingerprint, load_tokenizer

    manifest = loader.stores[0].manifest
    try:
        encoding = load_tokenizer(manifest.tokenizer)
    except UsageError:
        return lambda tokens: " ".join(map(str, tokens.tolist()))
    if manifest.fingerprint not in ("", fingerprint(encoding)):
        return lambda tokens: " ".join(map(str, tokens.tolist()))

    def text(tokens: np.ndarray) -> str:
        kept = tokens[tokens != loader.end_of_document]
        return encoding.decode_bytes(kept.tolist()).decode("utf-8", errors="replace")

    return text


def _lines(sample: Sample, text: Text, characters: int) -> Iterator[str]:
    """The lines of a sample for people."""
    yield (
        f"\nsample {sample.number}: {sample.source}, epoch {sample.epoch}, window {sample.window:,}"
    )
    yield f"  {'document':>12}  {'offset':>9}  {'tokens':>6}  text"
    for span in sample.spans:
        shown = text(sample.tokens[span.start : span.start + span.tokens])
        if characters and len(shown) > characters:
            shown = shown[:characters] + "..."
        quoted = json.dumps(shown, ensure_ascii=False)
        yield f"  {span.document:>12,}  {span.offset:>9,}  {span.tokens:>6,}  {quoted}"


def _json_lines(sample: Sample, text: Text) -> Iterator[str]:
    """The lines of a sample for programs, with the whole text."""
    for span in sample.spans:
        yield json.dumps(
            {
                "sample": sample.number,
                "source": str(sample.source),
                "epoch": sample.epoch,
                "window": sample.window,
                "document": span.document,
                "offset": span.offset,
                "tokens": span.tokens,
                "text": text(sample.tokens[span.start : span.start + span.tokens]),
            }
        )

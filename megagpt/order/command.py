"""`megagpt data inspect | verify | import | stage | batch`: corpora, and a step's documents.

The commands about shards come from megagpt.corpus.command; `batch` follows from the run file and
the corpora alone. Where the run folder has recorded the step, its digest must agree.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.config import add_overrides
from megagpt.corpus.command import add_parsers
from megagpt.errors import DamageError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from megagpt.config import RunConfig
    from megagpt.order.loader import TokenLoader
    from megagpt.order.trace import Sample

    Text = Callable[[np.ndarray], str]


def add_options(made: argparse.ArgumentParser) -> None:
    """Adds the commands of `data`."""
    made.description = "Looks into, checks and imports folders of shards."
    actions = made.add_subparsers(metavar="ACTION", required=True)
    add_parsers(actions)
    add_batch(actions)


def add_batch(subparsers: Any) -> None:
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
    add_overrides(parser)
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
    parser.add_argument(
        "--json", action="store_true", help="one JSON object for each document, with its ids"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints one step."""
    from megagpt.config import load_run
    from megagpt.order.loader import training_loader
    from megagpt.order.trace import trace

    path = args.file / "config.toml" if args.file.is_dir() else args.file
    config = load_run(path, args.overrides)
    first, count, record = _samples(config, args.step)
    loader, size = training_loader(config), count * config.model.n_ctx
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
            _json_lines(sample, text, loader.masked)
            if args.json
            else _lines(sample, text, args.characters)
        ):
            print(line)
    return 0


def _samples(config: RunConfig, step: int) -> tuple[int, int, dict[str, Any]]:
    """(first sample, samples, what metrics.jsonl says of it: {} where it is not trained) of a step.

    A trained step read what the run recorded: the schedule may have been another then, and a
    rollback may have skipped samples. One ahead follows the newest by the schedule as it is now.
    Raises UsageError for a step that the run does not come to.
    """
    from megagpt.log import read_metrics

    there = (Path(config.output) / "metrics.jsonl").is_file()
    records = (
        [r for r in read_metrics(config.output) if {"digest", "step"} <= r.keys()] if there else []
    )
    n_ctx, schedule = config.model.n_ctx, config.schedule
    for record in records:
        if record["step"] == step and {"samples", "batch_tokens"} <= record.keys():
            count = int(record["batch_tokens"]) // n_ctx
            first = int(record["samples"]) - count
            if first < 0 or count < 1:
                raise UsageError(
                    f"step {step} has {count:,} samples, but {config.output} had taken "
                    f"{record['samples']:,} by its end: metrics.jsonl is not what it was; look at "
                    f"{config.output}/config.toml"
                )
            return first, count, record
    # A record that does not tell its place is only compared.
    [record] = [r for r in records if r["step"] == step][-1:] or [{}]
    before = [r for r in records if r["step"] < step and {"samples", "tokens"} <= r.keys()]
    newest = before[-1] if before else {"step": 0, "tokens": 0, "samples": 0}
    at, tokens = int(newest["step"]), int(newest["tokens"])
    skipped = int(newest["samples"]) - tokens // n_ctx
    while at < step - 1 and tokens < schedule.total_tokens:
        at, tokens = at + 1, tokens + schedule.batch(tokens)
    if step < 1 or tokens >= schedule.total_tokens:
        last = schedule.n_steps if step < 1 else at
        raise UsageError(f"--step {step}: the run has the steps 1 to {last:,}")
    return tokens // n_ctx + skipped, schedule.batch(tokens) // n_ctx, record


def _decoder(loader: TokenLoader) -> Text:
    """Tokens (N,) to text without END-OF-DOCUMENT; to ids where no tokenizer fits."""
    try:
        encoding = loader.encoding
    except (UsageError, DamageError):
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
    if not sample.scored[1:].all():
        yield f"  {int(sample.scored.sum())} of its {len(sample.scored) - 1} targets are scored"
    for span in sample.spans:
        shown = text(sample.tokens[span.start : span.start + span.tokens])
        if characters and len(shown) > characters:
            shown = shown[:characters] + "..."
        quoted = json.dumps(shown, ensure_ascii=False)
        yield f"  {span.document:>12,}  {span.offset:>9,}  {span.tokens:>6,}  {quoted}"


def _json_lines(sample: Sample, text: Text, masked: bool) -> Iterator[str]:
    """The lines of a sample for programs, with all token ids and the whole text; of masked data
    with 1 for each token that is scored as a target too."""
    for span in sample.spans:
        part = slice(span.start, span.start + span.tokens)
        ids = sample.tokens[part]
        told = {
            "sample": sample.number,
            "source": str(sample.source),
            "epoch": sample.epoch,
            "window": sample.window,
            "document": span.document,
            "offset": span.offset,
            "tokens": span.tokens,
            "ids": ids.tolist(),
            "text": text(ids),
        }
        yield json.dumps(
            told | ({"scored": sample.scored[part].astype(int).tolist()} if masked else {})
        )

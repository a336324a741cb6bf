"""Trains a byte-level BPE with Hugging Face tokenizers and stores it for tiktoken."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megagpt.corpus.documents import find_sources
from megagpt.corpus.huggingface import as_input
from megagpt.corpus.texts import Problem, read, utf8
from megagpt.corpus.unit import plan_units
from megagpt.errors import DamageError, UsageError
from megagpt.files import temporary_of
from megagpt.tokenizer import END_OF_DOCUMENT
from megagpt.tokenizer.json import read_tokenizer_file, write_tokenizer_file

SMALLEST, LARGEST = 257, 1 << 24
"""The bytes and END-OF-DOCUMENT; what a trainer has memory for."""
LONG = 1 << 12
"""Characters of a run with or without white space that are trained on together: the trainer takes
time with the square of a word's length."""
CHECKED, CHECKED_SIZE = 1000, 1 << 26
"""Documents on which the two libraries are compared, and about how many characters of them."""

_RUN = re.compile(rf"\s{{{LONG},}}|\S{{{LONG},}}")


def texts(inputs: Sequence[str], args: Namespace, left_out: Counter[str]) -> Iterator[str]:
    """The documents of the inputs up to `args.sample_bytes`; broken ones are left out and counted
    by their reason."""
    left = args.sample_bytes
    found = find_sources([as_input(text, args.text_field) for text in inputs], args.format)
    left_out.update(reason for _, reason, _ in found.problems)
    for unit in plan_units(found.sources):
        for item in read(unit, args.text_field):
            if isinstance(item, Problem):
                left_out.update([item.reason] if item.reason else [])
            else:
                text, content = utf8(item[1])
                yield text
                left -= len(content)
                if left <= 0:
                    return


def short_runs(text: str) -> list[str]:
    """The text in pieces without a run, of white space or of anything else, above LONG."""
    parts, start = [], 0
    for run in _RUN.finditer(text) if len(text) > LONG else ():
        parts += [
            text[start : run.start()],
            *(run[0][at : at + LONG] for at in range(0, len(run[0]), LONG)),
        ]
        start = run.end()
    return [*parts, text[start:]] if start else [text]


def train_tokenizer(inputs: Sequence[str], args: Namespace) -> str:
    """Train on `inputs`, write `args.output`; a line that says what was made.

    Raises UsageError for a size that cannot be reached, DamageError when tiktoken and Hugging Face
    disagree on the training text; `args.output` is what it was then.
    """
    import tokenizers

    if not SMALLEST <= args.vocab_size <= LARGEST:
        raise UsageError(
            f"vocab_size {args.vocab_size}: must be at least {SMALLEST}, the bytes and "
            f"{END_OF_DOCUMENT}, and at most {LARGEST}"
        )
    if args.output.is_dir() or not args.output.name:
        raise UsageError(f"output {args.output}: is a folder; give the name of the file to write")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=args.vocab_size - 1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    left_out: Counter[str] = Counter()
    sample: list[str] = []

    def words() -> Iterator[str]:
        size = 0
        for text in texts(inputs, args, left_out):
            if len(sample) < CHECKED and size < CHECKED_SIZE:
                sample.append(text)
                size += len(text)
            yield from short_runs(text)

    model.train_from_iterator(words(), trainer)
    merges = _merges(json.loads(model.to_str())["model"]["merges"])
    if 256 + len(merges) + 1 != args.vocab_size:
        raise UsageError(
            f"the text has only {len(merges)} pairs to merge, vocab_size {args.vocab_size} needs "
            f"{args.vocab_size - SMALLEST}; give more text or a smaller --vocab-size"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary_of(args.output)
    try:
        write_tokenizer_file(draft, merges, END_OF_DOCUMENT)
        _compare(sample, draft)
        draft.replace(args.output)
    finally:
        draft.unlink(missing_ok=True)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(left_out.items()))
    return (
        f"{args.output}: {args.vocab_size:,} tokens; Hugging Face and tiktoken give the same ids "
        f"on {len(sample):,} documents; left out: {reasons or 'nothing'}"
    )


def _merges(merges: list[str | list[str]]) -> list[tuple[str, str]]:
    """Pairs in order, without those that make a word again: tiktoken merges by word, and the
    first pair decides its rank."""
    result, known = [], set()
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left + right not in known:
            known.add(left + right)
            result.append((left, right))
    return result


def _compare(sample: Sequence[str], file: Path) -> None:
    """Encode the first documents with both libraries. Raises DamageError."""
    import tokenizers

    ours = read_tokenizer_file(file)
    theirs = tokenizers.Tokenizer.from_file(str(file))
    # Hugging Face takes the literal in a text for the special token, unlike encode_ordinary.
    theirs.encode_special_tokens = True
    for part in (part for text in sample for part in short_runs(text)):
        ids = ours.encode_ordinary(part)
        if ids != theirs.encode(part, add_special_tokens=False).ids or ours.decode(ids) != part:
            raise DamageError(
                f"tiktoken and Hugging Face disagree on {part[:60]!r}; choose another --vocab-size"
            )

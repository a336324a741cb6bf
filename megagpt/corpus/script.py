"""The options and the end of every data_prep script: argparse, messages on stderr, exit codes."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from megagpt.corpus.manifest import Split
from megagpt.corpus.source import FORMATS, Documents
from megagpt.corpus.writer import SHARD_TOKENS
from megagpt.errors import EXIT_OK, EXIT_STOPPED, MegagptError


def parser(description: str, output: str | None = None) -> argparse.ArgumentParser:
    """A parser with the options that all corpora share; without `output`, --output is required."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = result.add_argument
    add("--output", type=Path, required=output is None, default=output and Path(output),
        metavar="DIR", help="folder of the shards; validation goes to DIR-validation")  # fmt: skip
    add("--tokenizer", default="gpt2", metavar="NAME",
        help="gpt2, bytes, an encoding of tiktoken, or a tokenizer.json")  # fmt: skip
    add("--workers", type=int, default=0, metavar="N", help="processes; 0 is one for each core")
    add("--validation-fraction", type=float, default=0.0, metavar="F",
        help="share of documents that goes to validation, 0 to 1")  # fmt: skip
    add("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N",
        help="tokens of a shard; a longer document has its own")  # fmt: skip
    add("--deduplicate", action="store_true", help="drop exact copies of earlier documents")
    add("--near-duplicates", type=float, default=0.0, nargs="?", const=0.8, metavar="J",
        help="drop documents whose 5-word shingles have this Jaccard similarity with an earlier "
        "one's (0.8 when no value is given); keeps 1.6 kB of memory for each document")  # fmt: skip
    add("--hashes", type=int, default=128, metavar="N",
        help="MinHash hashes for --near-duplicates; GPT-3 used 10")  # fmt: skip
    add("--decontaminate", nargs="+", default=(), metavar="FILE",
        help="evaluation files; text that shares 13 words in a row with them goes, unless more "
        "than 10 documents have it; the input is read twice")  # fmt: skip
    add("--strict", action="store_true", help="stop at the first document that would be left out")
    add("--backend", default="auto", choices=("auto", "fastokens", "tiktoken"),
        help="encoder; auto is fastokens when it gives tiktoken's ids")  # fmt: skip
    return result


def file_options(result: argparse.ArgumentParser) -> None:
    """The options that make sense for files only."""
    result.add_argument("--text-field", default="text", metavar="NAME",
                        help="field of JSON objects, column of Parquet files")  # fmt: skip
    result.add_argument("--format", choices=FORMATS,
                        help="what every file holds, whatever its ending")  # fmt: skip


def run(work: Callable[[], int]) -> int:
    """Run a script's work; messages go to stderr, a known error becomes its exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    # A batch system's signal ends the run as Ctrl-C does: cleanly, to be continued.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except MegagptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        # Between one preparation and the next, or before the first.
        print("error: stopped; run the same command again to continue", file=sys.stderr)
        return EXIT_STOPPED


def prepare_with(
    args: argparse.Namespace, inputs: Iterable[str | Path | Documents], **more: Any
) -> int:
    """Prepare `inputs` with the parsed options (and `more` of them) and print the summary."""
    from megagpt.corpus.prepare import Options, prepare

    known: dict[str, Any] = {
        key: value for key, value in vars(args).items() if key in Options.__dataclass_fields__
    }
    known["decontaminate"] = tuple(known["decontaminate"])
    print(prepare(inputs, Options(**known | more)).text())
    return EXIT_OK


def prepare_by_place(args: argparse.Namespace, text: str, percent: dict[str, int]) -> int:
    """Prepare one text that is split by place, as the old corpora are: `percent` of it for each
    split, in order. Each is one document in a folder of its own, OUTPUT and OUTPUT-SPLIT."""
    start = before = 0
    for name, share in percent.items():
        before += share
        end = len(text) * before // 100
        rule = f"characters {start} to {end} of {len(text)}"
        output = (
            args.output if name == "train" else args.output.with_name(f"{args.output.name}-{name}")
        )
        documents = Documents(f"{args.output.name}, {rule}", partial(list, [text[start:end]]))
        prepare_with(
            args,
            [documents],
            output=output,
            validation_fraction=0.0,
            split=Split(name, rule=rule),
        )
        start = end
    return EXIT_OK

"""The command lines of this package: the scripts of data_prep, and `megagpt data inspect | verify |
import | stage`, to which megagpt.order.command adds `batch`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megagpt.corpus.documents import FORMATS, Documents
from megagpt.corpus.foreign import RAW
from megagpt.corpus.manifest import Subset
from megagpt.corpus.shards import SHARD_TOKENS
from megagpt.errors import EXIT_DAMAGE, EXIT_OK, Stopped, UsageError, ended

UNSEALED = (
    "; its manifest.json was written by an earlier megagpt, without a checksum of itself: what it "
    "says of split, sources, totals and options is not checked"
)
"""What `data verify` adds for such a manifest."""

# --- the scripts of data_prep -------------------------------------------------------------------


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
    add("--validation-by-place", action="store_true",
        help="take that share off the end of each text instead: for one text, or few")  # fmt: skip
    add("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N",
        help="tokens of a shard; a longer document has its own")  # fmt: skip
    add("--deduplicate", action="store_true", help="drop exact copies of earlier documents")
    add("--near-duplicates", type=float, default=0.0, nargs="?", const=0.8, metavar="J",
        help="drop documents whose 5-word shingles are like an earlier one's: 95%% of those "
        "with Jaccard similarity J (0.8 when no value is given), nearly all from J + 0.05 on, "
        "a fifth at J - 0.1, 1 in 1,000 at J - 0.2; keeps 3 kB of memory a document")  # fmt: skip
    add("--hashes", type=int, default=128, metavar="N",
        help="MinHash hashes for --near-duplicates; more tell more sharply")  # fmt: skip
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

    def continued() -> int:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
        # A batch system's signal ends the run as Ctrl-C does: cleanly, to be continued.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return work()
        except KeyboardInterrupt:
            # Between one preparation and the next, or before the first.
            raise Stopped("stopped; run the same command again to continue") from None

    return ended(continued, hint="; make space and run the same command again")


def prepare_with(
    args: argparse.Namespace, inputs: Iterable[str | Path | Documents], **more: Any
) -> int:
    """Prepare `inputs` with the parsed options (and `more` of them) and print the summary."""
    from megagpt.corpus.pipe import prepare
    from megagpt.corpus.recipe import PrepareOptions

    known: dict[str, Any] = {
        key: value
        for key, value in vars(args).items()
        if key in PrepareOptions.__dataclass_fields__
    }
    known["decontaminate"] = tuple(known["decontaminate"])
    print(prepare(inputs, PrepareOptions(**known | more)).text())
    return EXIT_OK


def split_by_place(
    output: Path, size: int, percent: dict[str, int]
) -> Iterator[tuple[str, Path, int, int]]:
    """(split, its folder, first place, end) of one text of `size` that is split by place, as the
    old corpora are: `percent` of it for each split, in order, in OUTPUT and OUTPUT-SPLIT."""
    from megagpt.corpus.unfinished import beside

    start = before = 0
    for name, share in percent.items():
        before += share
        end = size * before // 100
        yield name, output if name == "train" else beside(output, f"-{name}"), start, end
        start = end


def prepare_by_place(args: argparse.Namespace, text: str, percent: dict[str, int]) -> int:
    """Prepare one text that is split by place; the part of each split is one document."""
    for name, folder, start, end in split_by_place(args.output, len(text), percent):
        rule = f"characters {start} to {end} of {len(text)}"
        documents = Documents(f"{args.output.name}, {rule}", partial(list, [text[start:end]]))
        split = Subset(name, rule=rule)
        unsplit = {"validation_fraction": 0.0, "validation_by_place": False}
        prepare_with(args, [documents], output=folder, split=split, **unsplit)
    return EXIT_OK


# --- megagpt data ------------------------------------------------------------------------------


def add_parsers(subparsers: Any) -> None:
    """Add the commands about shards; each sets `run`, a function of the parsed arguments."""
    inspect = subparsers.add_parser(
        "inspect",
        help="what is in a folder of shards",
        description="Prints the tokenizer, totals, what was left out, a histogram of the lengths "
        "of documents, and the start of the first ones as text.",
        epilog="Exit codes: 0 done; 2 no corpus; 3 damage that was met.",
    )
    inspect.add_argument("folder", type=Path, metavar="DIR", help="folder with a manifest.json")
    inspect.add_argument(
        "--documents", type=int, default=3, metavar="N", help="documents to show as text"
    )
    inspect.add_argument(
        "--characters", type=int, default=300, metavar="N", help="characters of each to show"
    )
    inspect.set_defaults(run=run_inspect)

    verify = subparsers.add_parser(
        "verify",
        help="check checksums, indexes, END-OF-DOCUMENT, ids and masks; reads every byte",
        description="Reads every byte of the shards and prints what is not as the manifest says: "
        "checksums, the index against the tokens, END-OF-DOCUMENT after every document and nowhere "
        "else, or records of one length, ids outside the vocabulary, masks of 0 and 1.",
        epilog="Exit codes: 0 all are whole; 2 no corpus; 3 damage, each named.",
    )
    verify.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="folder with a manifest.json"
    )
    verify.set_defaults(run=run_verify)

    adopt = subparsers.add_parser(
        "import",
        help="take Megatron pairs, nanoGPT's uint16 .bin, llm.c shards or .npy",
        description="Writes a manifest beside Megatron pairs that can stay where they are, or "
        "converts what others have tokenized into a folder of shards.",
        epilog="Exit codes: 0 done; 2 files that cannot be taken; 3 damage.",
    )
    adopt.add_argument(
        "inputs", type=Path, nargs="+", metavar="INPUT",
        help="files, Megatron prefixes or folders; val and test in names tell of splits",
    )  # fmt: skip
    adopt.add_argument(
        "--output", type=Path, metavar="DIR",
        help="convert into this folder; without it a manifest is written beside Megatron pairs",
    )  # fmt: skip
    adopt.add_argument(
        "--tokenizer", metavar="NAME", help="what the tokens were made with; gpt2 is assumed"
    )
    adopt.add_argument(
        "--raw", choices=RAW, default="", help="take files as bare numbers, whatever they look like"
    )
    adopt.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N",
                       help="tokens of a shard")  # fmt: skip
    adopt.set_defaults(run=run_import)
    _add_stage(subparsers)


def _add_stage(subparsers: Any) -> None:
    staged = subparsers.add_parser(
        "stage",
        help="copy corpora to a host's own disk, once, each file against its checksum",
        description="Copies folders of shards below SCRATCH; of several processes on a host one "
        "copies and the others wait. Files that are there already and whole are kept. Prints where "
        "each copy is, for data.train and data.validation.",
        epilog="Exit codes: 0 done; 2 no corpus, or no room; 3 a damaged file, named.",
    )
    staged.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="folder with a manifest.json"
    )
    staged.add_argument(
        "scratch", type=Path, metavar="SCRATCH", help="a folder of this host's disk"
    )
    staged.set_defaults(run=run_stage)


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a folder holds."""
    from megagpt.corpus.inspect import describe

    for name in ("documents", "characters"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must be 0 or more")
    print(describe(args.folder, args.documents, args.characters))
    return EXIT_OK


def run_verify(args: argparse.Namespace) -> int:
    """Print every problem; 3 when there is one."""
    from megagpt.corpus.manifest import read_manifest
    from megagpt.corpus.progress import Progress
    from megagpt.corpus.verify import verify_shards

    damaged = False
    for folder in args.folders:
        manifest = read_manifest(folder)
        size = sum(shard.bytes for shard in manifest.shards)
        with Progress(f"verifying {folder}", size) as progress:
            problems = verify_shards(folder, progress.add)
        damaged |= bool(problems)
        for problem in problems:
            print(problem)
        if not problems:
            what = "records" if manifest.record_length else "documents"
            print(
                f"{folder}: whole, {len(manifest.shards)} shards, {manifest.documents:,} {what}, "
                f"{manifest.tokens:,} tokens{'' if manifest.sealed else UNSEALED}"
            )
    if damaged:
        print("damaged shards: prepare or copy them again", file=sys.stderr)
    return EXIT_DAMAGE if damaged else EXIT_OK


def run_import(args: argparse.Namespace) -> int:
    """Write a manifest or convert."""
    from megagpt.corpus.adopt import import_shards
    from megagpt.corpus.progress import Progress

    if not args.tokenizer:
        print("tokenizer: gpt2 is assumed; --tokenizer names another")
    with Progress("importing") as progress:
        manifests = import_shards(
            args.inputs,
            args.output,
            tokenizer=args.tokenizer or "gpt2",
            shard_tokens=args.shard_tokens,
            raw=args.raw,
            progress=progress.add,
        )
    for made in manifests:
        print(
            f"{made.folder}: {made.split.name} split, {made.documents:,} documents, "
            f"{made.tokens:,} tokens of {made.tokenizer_name}"
        )
    return EXIT_OK


def run_stage(args: argparse.Namespace) -> int:
    """Copy corpora and print where they are."""
    from megagpt.corpus.stage import stage

    if len({folder.resolve().name for folder in args.folders}) < len(args.folders):
        raise UsageError(
            f"{', '.join(map(str, args.folders))}: folders of one name would be one copy; give "
            "them a SCRATCH each"
        )
    for folder in args.folders:
        copy, size = stage(folder, args.scratch)
        print(f"{copy}: {size:,} bytes copied")
    return EXIT_OK

"""`megagpt data inspect | verify | import`; megagpt.order.command adds `batch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megagpt.errors import EXIT_DAMAGE, EXIT_OK


def add_parsers(subparsers: Any) -> None:
    """Add the commands about shards; each sets `run`, a function of the parsed arguments."""
    inspect = subparsers.add_parser("inspect", help="what is in a folder of shards")
    inspect.add_argument("folder", type=Path, metavar="DIR", help="folder with a manifest.json")
    inspect.add_argument(
        "--documents", type=int, default=3, metavar="N", help="documents to show as text"
    )
    inspect.add_argument(
        "--characters", type=int, default=300, metavar="N", help="characters of each to show"
    )
    inspect.set_defaults(run=run_inspect)

    verify = subparsers.add_parser(
        "verify", help="check checksums, indexes, END-OF-DOCUMENT and ids; reads every byte"
    )
    verify.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    verify.set_defaults(run=run_verify)

    adopt = subparsers.add_parser(
        "import", help="take Megatron pairs, nanoGPT .bin files or llm.c shards"
    )
    adopt.add_argument(
        "inputs", type=Path, nargs="+", metavar="INPUT", help=".bin files, prefixes or a folder"
    )
    adopt.add_argument(
        "--output", type=Path, metavar="DIR",
        help="convert into this folder; without it a manifest is written beside Megatron pairs",
    )  # fmt: skip
    adopt.add_argument(
        "--tokenizer", default="gpt2", metavar="NAME", help="what the tokens were made with"
    )
    adopt.add_argument("--shard-tokens", type=int, metavar="N", help="tokens of a shard")
    adopt.set_defaults(run=run_import)


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a folder holds."""
    from megagpt.corpus.inspect import describe

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
        progress = Progress(f"verifying {folder}", sum(shard.bytes for shard in manifest.shards))
        problems = verify_shards(folder, progress.add)
        progress.close()
        damaged |= bool(problems)
        for problem in problems:
            print(problem)
        if not problems:
            print(
                f"{folder}: whole, {len(manifest.shards)} shards, {manifest.documents:,} "
                f"documents, {manifest.tokens:,} tokens"
            )
    if damaged:
        print("damaged shards: prepare or copy them again", file=sys.stderr)
    return EXIT_DAMAGE if damaged else EXIT_OK


def run_import(args: argparse.Namespace) -> int:
    """Write a manifest or convert."""
    from megagpt.corpus.adopt import import_shards
    from megagpt.corpus.progress import Progress
    from megagpt.corpus.writer import SHARD_TOKENS

    progress = Progress("importing")
    manifest = import_shards(
        args.inputs,
        args.output,
        tokenizer=args.tokenizer,
        shard_tokens=args.shard_tokens or SHARD_TOKENS,
        progress=progress.add,
    )
    progress.close()
    print(f"{manifest.folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    return EXIT_OK

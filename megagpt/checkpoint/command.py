"""megagpt checkpoint list | verify | reshape | consolidate (L2)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megagpt.checkpoint import record
from megagpt.checkpoint.export import (
    INDEX,
    consolidate,
    consolidated_state,
    reshape,
)
from megagpt.checkpoint.journal import NAME, journal_problems
from megagpt.checkpoint.load import data_of_another_tokenizer, verify
from megagpt.checkpoint.weights import add_shard_option
from megagpt.errors import EXIT_DAMAGE, EXIT_OK, DamageError, UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the commands."""
    parser.description = "What a run folder's checkpoints hold, and whether they are whole."
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, function, text in (
        ("list", show, "one line for each checkpoint"),
        ("verify", check, "read every byte, compare it with its checksum, and open what it holds"),
        ("reshape", cut, "write the checkpoint as the files of another number of ranks"),
        ("consolidate", gather, "write the weights as safetensors with canonical names"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        more = ", or a folder of consolidated weights" if name == "verify" else ""
        action.add_argument(
            "folder",
            metavar="RUN_DIR",
            type=Path,
            help=f"run folder, or one checkpoint of it{more}",
        )
        if name == "consolidate":
            action.add_argument("output", metavar="OUT", type=Path, help="folder to write; new")
            add_shard_option(action)
        if name == "reshape":
            action.add_argument("output", metavar="OUT", type=Path, help="run folder to write into")
            action.add_argument(
                "--ranks", type=int, default=1, metavar="N", help="files (default: %(default)s)"
            )
        action.set_defaults(run=function)


def show(args: argparse.Namespace) -> None:
    """Prints step, tokens, size and layout of each checkpoint."""
    for folder in record.checkpoints_of(args.folder):
        try:
            state = record.read_record(folder)
        except DamageError as error:
            print(f"{folder.name}  damaged: {error}")
        except UsageError as error:
            print(f"{folder.name}  {error}")
        else:
            size = sum(f.bytes for f in state.files)
            split = ", ".join(f"{k} {v}" for k, v in state.layout.items())
            kept = "  milestone" if state.milestone else ""
            print(f"{folder.name}  {state.tokens:,} tokens  {size:,} bytes  {split}{kept}")


def check(args: argparse.Namespace) -> int:
    """Prints each checkpoint and the journal, or the consolidated weights, with "whole" or what is
    damaged; exit code 3 for any damage."""
    damaged, sealed = False, None
    if (args.folder / INDEX).exists():
        problems, names = consolidated_state(args.folder)
        print(f"{args.folder.absolute().name}  {_verdict(problems, names)}")
        return EXIT_DAMAGE if problems else EXIT_OK
    for folder in record.checkpoints_of(args.folder):
        try:
            saved, line = _examined(folder)
        except (OSError, DamageError):
            if folder.exists():
                raise
            saved = None
        if saved is None and not folder.exists():
            # A run that trains meanwhile keeps only its newest.
            print(f"{folder.name}  no longer there: its run has removed it meanwhile")
            continue
        damaged = damaged or saved is None
        sealed = saved.rollbacks if saved else sealed
        print(f"{folder.name}  {line}", flush=True)
    if (args.folder / NAME).exists():
        problems = journal_problems(args.folder, sealed)
        damaged = damaged or bool(problems)
        print(f"{NAME}  {_verdict(problems, [])}")
    return EXIT_DAMAGE if damaged else EXIT_OK


def _examined(folder: Path) -> tuple[record.CheckpointRecord | None, str]:
    """The manifest of a checkpoint, None where it is damaged, and what is said of it."""
    if problems := verify(folder):
        return None, _verdict(problems, [])
    saved = record.read_record(folder)
    line = _verdict([], record.strangers(folder, saved.files))
    if paths := data_of_another_tokenizer(folder):
        line += "; of another tokenizer by now: " + ", ".join(map(repr, paths))
    return saved, line


def _verdict(problems: Sequence[str], strangers: Sequence[str]) -> str:
    """What is wrong with a folder, or that it is whole and what else lies there."""
    named = "; not in its manifest, and read by nothing: " + ", ".join(map(repr, strangers))
    return "; ".join(problems) or "whole" + (named if strangers else "")


def cut(args: argparse.Namespace) -> None:
    """Writes the newest checkpoint cut anew; prints where."""
    print(reshape(args.folder, args.output, args.ranks))


def gather(args: argparse.Namespace) -> None:
    """Writes the newest checkpoint's weights; prints where."""
    for path in consolidate(args.folder, args.output, args.shard_bytes):
        print(path)

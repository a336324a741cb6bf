# PYTHON_ARGCOMPLETE_OK
"""The `megagpt` command: one table of subcommands, each in a module of its own (L3).

A module is imported only when its command is called, so that `megagpt --help` is instant. Its
`add_options(parser)` describes the command, and its `run(args)` does the work; it returns an exit
code where there are several.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megagpt import __version__
from megagpt.errors import EXIT_OK, UsageError, ended

COMMANDS = {
    "init": ("start.command", "write a run file for a corpus, a size and this machine"),
    "train": ("start.launcher", "check a run file, then train it on this machine"),
    "doctor": (
        "check.command",
        "will training work here: versions, GPUs, network, disks, hosts, shards",
    ),
    "plan": ("plan.command", "what a run will do: layout, batch ramp, steps"),
    "launch": ("submit.command", "a job for SLURM, PBS, LSF or Kubernetes that is made for a run"),
    "data": ("order.command", "what is in the shards; are they whole; one step's documents"),
    "checkpoint": ("checkpoint.command", "list, verify, reshape and consolidate checkpoints"),
    "import": ("hub.importing", "weights that others trained, as a folder of ours"),
    "export": ("hub.exporting", "a trained model as a folder that transformers opens"),
    "generate": ("use.generate", "text from a trained model"),
    "chat": ("use.chat", "a dialogue with a trained model"),
    "serve": ("serve.command", "a trained model behind OpenAI's API, and a page to try it"),
    "evaluate": ("tasks.command", "loss and bits per byte of a trained model on a corpus; tasks"),
    "report": ("report", "curves of one or several runs as a picture and a page"),
    "watch": ("report.watch", "follow a run in the terminal"),
    "parity": ("check.parity", "train a run file under every layout and compare the losses"),
    "verify-resume": ("check.resume", "train with and without a restart, compare bits"),
}
"""Command -> (module of megagpt, help)."""


def parser(command: str | None) -> argparse.ArgumentParser:
    """The command line; only `command`'s module is imported, the others show their help line."""
    made = argparse.ArgumentParser(
        prog="megagpt",
        description="Trains the GPT-3 family with DeepSpeed, from one laptop to a cluster. "
        "To begin: megagpt init, then megagpt train RUN.toml",
        epilog="Exit codes: 0 done; 2 wrong usage or configuration; 3 damaged input or a full "
        "disk; 4 a run that made nothing sound any more; 75 stopped with a checkpoint saved; 1 "
        "anything else.",
    )
    made.add_argument("--version", action="version", version=f"megagpt {__version__}")
    # deepspeed's launcher puts it before everything else; ranks read the environment.
    made.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        one = commands.add_parser(name, help=text)
        if name == command:
            found = importlib.import_module(f"megagpt.{module}")
            # A command with actions sets the function of each.
            one.set_defaults(run=getattr(found, "run", None))
            found.add_options(one)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Errors go to stderr as one message."""
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    return ended(lambda: run(sys.argv[1:] if argv is None else argv))


def _complete() -> None:
    """Answers the shell's Tab, where argcomplete is installed, and ends."""
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    argcomplete.autocomplete(parser(words[1] if len(words) > 1 else None))


def run(argv: Sequence[str]) -> int:
    """Runs a command; raises what ended() tells."""
    command = next((word for word in argv if not word.startswith("-")), None)
    made = parser(command)
    args, later = made.parse_known_args(argv)
    # argparse takes overrides right behind the run file alone; they may follow options, too.
    if later and (not hasattr(args, "overrides") or any(word.startswith("-") for word in later)):
        made.error(f"unrecognized arguments: {' '.join(later)}")
    if later:
        args.overrides = [*args.overrides, *later]
    for name, value in vars(args).items():
        _check(name.replace("_", "-"), value)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return args.run(args) or EXIT_OK


def _check(name: str, value: object) -> None:
    """Raises UsageError for what no option can be: numbers beyond 64 bits, names of no file."""
    if isinstance(value, list):
        for one in value:
            _check(name, one)
    if isinstance(value, int | float) and not abs(value) < 2**63:
        raise UsageError(f"{name} = {value!r:.40}: must be a number below 2^63")
    if isinstance(value, str | Path) and "\0" in str(value):
        raise UsageError(f"{name} = {str(value)!r}: must not hold the character NUL")


if __name__ == "__main__":
    sys.exit(main())

"""`megagpt train RUN.toml`: checks a run on this machine, then becomes the launcher that trains it.

    megagpt train RUN.toml                     a rank for each GPU; on a CPU one process
    megagpt train RUN.toml --ranks 2 schedule.peak_lr=1e-3

What a run file, its layout or its corpora have wrong is said before any rank starts. Several hosts
need a launcher that reaches them: docs/how-to/clusters.md.
"""

import argparse
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from megagpt.check.machine import gpus
from megagpt.cluster.ranks import discover
from megagpt.config import RunConfig, add_overrides, load_run
from megagpt.errors import UsageError
from megagpt.order.loader import check_corpora
from megagpt.plan.corpora import missing
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import layout_of
from megagpt.plan.sanity import oddities

LAUNCHERS = ("deepspeed", "torchrun")


def add_options(made: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    made.description = (
        "Checks run file, layout and corpora, then starts the ranks. Training again "
        "with the same run folder resumes at the exact step."
    )
    made.epilog = (
        "Exit codes: 0 done; 2 wrong usage or configuration; 3 damaged input; 4 weights "
        "that cannot be; 75 stopped with a checkpoint saved; 1 anything else."
    )
    made.add_argument("file", metavar="RUN.toml", help="run file")
    add_overrides(made)
    made.add_argument(
        "--ranks", type=int, default=0, metavar="N",
        help="processes that train; default: one for each GPU, on a CPU the fewest that can",
    )  # fmt: skip
    made.add_argument("--launcher", choices=LAUNCHERS, default="deepspeed", help="of several ranks")
    made.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on from a checkpoint although model, data, schedule, optimizer or seed changed",
    )


def run(args: argparse.Namespace) -> None:
    """Checks, then replaces this process by the launcher. Raises what the checks find."""
    config = load_run(args.file, args.overrides)
    words = [args.file, *args.overrides, *["--allow-changes"] * args.allow_changes]
    if discover(os.environ).world > 1:
        # Within srun or another launcher this is one rank of many, which checks with the others.
        _become(command_line(words, 1, args.launcher))
    cards = visible_gpus(os.environ)
    ranks = ranks_of(args.ranks, config, len(cards))
    try:
        check(config, ranks)
    except UsageError as error:
        raise UsageError(f"{error}{_preparation(args.file, config)}") from None
    if Path(config.output).exists():
        # Torch comes with it: not before the run file is known to be sound.
        from megagpt.run.folder import finished, summary

        if finished(config, of_any_recipe=args.allow_changes):
            print(summary(config))
            return
    for oddity in oddities(config):
        print(f"note: {oddity}", flush=True)
    print(f"{ranks} rank{'s' * (ranks > 1)}, run folder {config.output}", flush=True)
    if not cards:
        # The launcher would warn that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _become(command_line(words, ranks, args.launcher))


def _preparation(file: str, config: RunConfig) -> str:
    """The commands by which the head of a run file says that a corpus which is not there is made;
    "" where it says none."""
    text = Path(file).read_text(encoding="utf-8-sig")
    found = re.findall(r"(?m)^# *\w+ +(python data_prep/\S.*?)(?:  .*)?$", text)
    if not set(" ".join(found).split()).intersection(missing(config)):
        return ""
    return "".join([f"; {file} says how:", *(f"\n  {line}" for line in found)])


def _become(line: list[str]) -> NoReturn:
    """This process as another program: signals and the exit code need no one in between."""
    os.execvp(line[0], line)


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that ranks started here would see."""
    found = [str(index) for index in range(len(gpus()))]
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not found:
        return found
    return [one for one in chosen.split(",") if one.strip()]


def ranks_of(asked: int, config: RunConfig, cards: int) -> int:
    """Ranks to start. Raises UsageError for a number that cannot be."""
    if asked < 0:
        raise UsageError(f"--ranks {asked}: must be 1 or more")
    if asked and cards and asked > cards:
        raise UsageError(
            f"--ranks {asked}: this machine shows {cards} GPU{'s' * (cards > 1)}; a rank needs "
            "one of its own"
        )
    return asked or cards or config.parallel.pipeline * config.parallel.tensor


def check(config: RunConfig, ranks: int) -> None:
    """Raises UsageError or DamageError for a layout that cannot be, or corpora that do not fit."""
    resolve(config, layout_of(config, ranks), read_ds_config(config.parallel.ds_config))
    check_corpora(config)


def command_line(words: list[str], ranks: int, launcher: str) -> list[str]:
    """What starts so many ranks of `megagpt.train` here."""
    if ranks == 1:
        return [sys.executable, "-m", "megagpt.train", *words]
    with socket.socket() as probe:
        # Two runs on one machine need two ports.
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        place = [f"--nproc-per-node={ranks}", f"--master-port={port}"]
        return [*torchrun, *place, "-m", "megagpt.train", *words]
    beside = Path(sys.executable).with_name("deepspeed")
    script = str(beside) if beside.exists() else shutil.which("deepspeed")
    if script is None:
        raise UsageError("deepspeed's launcher is not installed; use --launcher torchrun")
    place = ["--num_gpus", str(ranks), "--master_port", port, "--quiet"]
    return [sys.executable, script, *place, "--module", "megagpt.train", *words]

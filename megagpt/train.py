"""The command that trains a run file (L3); the loop is in megagpt/loop.py.

    deepspeed --num_gpus 2 --module megagpt.train launch/runs/quickstart.toml
    torchrun --nproc-per-node 2 -m megagpt.train RUN.toml schedule.peak_lr=1e-3
    python -m megagpt.train RUN.toml

Training again with the same run folder resumes at the exact step. SIGTERM, SIGINT (Ctrl-C), SIGHUP,
SIGUSR1, SIGUSR2 and SIGXCPU save a checkpoint and end with exit code 75.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megagpt.cluster.process import (
    end,
    first_to_fail,
    join,
    leave,
    meeting_minutes,
    prepare_environment,
    share_folder,
)
from megagpt.cluster.ranks import Ranks, discover, told_rank
from megagpt.cluster.stop import StopRequest
from megagpt.cluster.watchdog import Watchdog
from megagpt.config import RunConfig, add_overrides, load_run
from megagpt.errors import EXIT_FAILURE, EXIT_OK, UsageError, ended
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import layout_of


def parser() -> argparse.ArgumentParser:
    """The command line of training."""
    made = argparse.ArgumentParser(
        prog="megagpt.train",
        description="Train a run file; with the same run folder again, resume at the exact step.",
        epilog="Exit codes: 0 done; 2 wrong usage or configuration; 3 damaged input; 4 weights "
        "that cannot be or no update any more, nothing of it saved; 75 stopped by a signal with a "
        "checkpoint saved; 1 anything else.",
    )
    made.add_argument("run", help="run file (.toml), for example launch/runs/quickstart.toml")
    add_overrides(made)
    made.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on from a checkpoint although model, data, schedule, optimizer or seed changed",
    )
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="everything up to the first step, on the meta device and for every kind of rank; "
        "nothing is trained or written",
    )
    made.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="ranks of a --dry-run without a launcher (default: those of plan.json beside the run "
        "file, else pipeline x tensor)",
    )
    # The deepspeed launcher adds this; the environment says the same.
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    hint = (
        "; the checkpoints that were saved are whole; make space and run the same command again to "
        "go on"
    )
    code = EXIT_FAILURE
    try:
        # A run goes on, and ends well, where nobody reads what it prints.
        code = ended(lambda: _run(argv), first_to_fail, hint, must_arrive=False)
    finally:
        leave(clean=code == EXIT_OK)
    return code


def _run(argv: Sequence[str] | None) -> int:
    args = parser().parse_intermixed_args(argv)
    level = logging.INFO if told_rank(os.environ) == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    if args.dry_run:
        return rehearse_run(args.run, args.overrides, args.ranks)
    if args.ranks is not None:
        raise UsageError("--ranks is for --dry-run; a launcher says how many ranks train")
    return train(args.run, args.overrides, args.allow_changes)


def set_environment(config: RunConfig, ranks: Ranks) -> None:
    """Sets what torch and NCCL read when they are first used; what was exported stays."""
    import torch

    from megagpt.engine.device import environment

    cuda = torch.cuda.is_available()
    for name, value in environment(config, cuda, ranks.local_world).items():
        os.environ.setdefault(name, value)


def rehearse_run(run: str, overrides: Sequence[str], n_ranks: int | None) -> int:
    """--dry-run: this rank alone under a launcher, else every kind of rank of `n_ranks`."""
    config = load_run(run, overrides)
    ranks = discover(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from megagpt.engine.rehearsal import kinds_of_ranks
    from megagpt.run.dry_run import dry_run, planned_ranks

    world = ranks.world
    if ranks.launcher == "python":
        alone = config.parallel.pipeline * config.parallel.tensor
        world = (planned_ranks(run) or alone) if n_ranks is None else n_ranks
    elif n_ranks not in (None, world):
        raise UsageError(f"--ranks {n_ranks}: {ranks.launcher} started {world} ranks")
    layout = layout_of(config, world)
    ds_config = resolve(config, layout, read_ds_config(config.parallel.ds_config))
    chosen = kinds_of_ranks(layout) if ranks.launcher == "python" else [ranks.rank]
    for line in dry_run(config, layout, ds_config, chosen):
        if ranks.rank == 0:
            print(line)
    return EXIT_OK


def train(run: str, overrides: Sequence[str], allow_changes: bool = False) -> int:
    """Trains one run file on this rank, from its environment's place among the ranks.

    Joins the process group, which the caller leaves.
    """
    config = load_run(run, overrides)
    ranks = discover(os.environ)
    layout = layout_of(config, ranks.world)
    ds_config = resolve(config, layout, read_ds_config(config.parallel.ds_config))
    prepare_environment(ranks, os.environ)
    folder, minutes = Path(config.output), config.log.watchdog_minutes
    stop = StopRequest(config.checkpoint, os.environ)
    with stop, Watchdog(folder, ranks, minutes, meeting_minutes(config)) as watchdog:
        set_environment(config, ranks)
        join(ranks, config)
        watchdog.begin("start")
        # From here on torch is there, with the environment that prepare_environment has set.
        from megagpt.loop import Trainer
        from megagpt.run.folder import make_run_folder, summary
        from megagpt.start.out_of_memory import is_out_of_memory, out_of_memory

        trainer = None
        try:
            if ranks.rank == 0:
                watchdog.keeps = make_run_folder(config, partial(stop.waits, watchdog.alive))
            share_folder(folder)
            trainer = Trainer(config, layout, ranks, ds_config, watchdog)
            trainer.run(stop, allow_changes)
            if ranks.rank == 0:
                print(summary(config))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(config, layout, ranks.rank, error) from None
        finally:
            if trainer is not None:
                trainer.close()
    return EXIT_OK


if __name__ == "__main__":
    end(main())

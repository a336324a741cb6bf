"""Trainings within this process, which spare the start of another; see group_of_one()."""

from collections.abc import Callable
from pathlib import Path

from megagpt.cluster.ranks import Ranks
from megagpt.cluster.stop import StopRequest
from megagpt.config import load_run
from megagpt.loop import Trainer
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from megagpt.run.folder import make_run_folder


def train_here(
    file: Path,
    *overrides: str,
    allow_changes: bool = False,
    before: Callable[[Trainer], None] | None = None,
    after: Callable[[Trainer, int], None] | None = None,
) -> None:
    """Trains a run file on this process as one start of the command does.

    before: called with the trainer before its first step.
    after: called behind each step's update with the trainer and the number of the step.
    """
    config = load_run(file, overrides)
    made = Trainer(
        config,
        Layout(),
        Ranks(),
        resolve(config, Layout(), read_ds_config(config.parallel.ds_config)),
    )
    train_step = made.train_step
    if after:

        def watched(run, step):
            result = train_step(run, step)
            after(made, step.number)
            return result

        made.train_step = watched
    try:
        make_run_folder(config)
        if before:
            before(made)
        with StopRequest(config.checkpoint) as stop:
            made.run(stop, allow_changes)
    finally:
        made.close()

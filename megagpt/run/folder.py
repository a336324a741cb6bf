"""What the run folder says of a run beside its metrics, and what a finished run reached (L3).

That a checkpoint of another recipe is not gone on with is checkpoint/load.py's."""

import contextlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from megagpt.checkpoint.load import differences
from megagpt.checkpoint.record import CONFIG, list_checkpoints, read_record
from megagpt.config import RunConfig, dump_run, load_run
from megagpt.errors import MegagptError, UsageError
from megagpt.files import Lock, write_file
from megagpt.log import RunLog, read_metrics
from megagpt.log.boards import check_wandb
from megagpt.log.environment import versions
from megagpt.plan.layout import Layout
from megagpt.run.state import RunState


def make_run_folder(config: RunConfig, alive: Callable[[], None] = lambda: None) -> Lock:
    """The run folder, kept for this process; `alive` is called while an earlier one ends. Raises
    UsageError where it cannot be, or where the run file wants a writer that is not installed."""
    check_wandb(config.log.wandb)
    try:
        Path(config.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"output = {config.output!r}: cannot make the run folder ({error.strerror}); give "
            "another place"
        ) from None
    return Lock(Path(config.output), alive=alive)


def write_run_files(
    config: RunConfig,
    run: RunState,
    layout: Layout,
    ds_config: dict[str, object],
    computing: dict[str, object],
    init_from: dict[str, object] | None = None,
) -> None:
    """The resolved configuration in the run folder: config.toml, ds_config.json, run.json.

    `computing` is what the engine chose for this device, `init_from` what weights this start has
    read; a later one, which reads none, keeps what is told of them.
    """
    folder = Path(config.output)
    if init_from is None and config.init_from:
        with contextlib.suppress(OSError, ValueError, KeyError):
            init_from = json.loads((folder / "run.json").read_text())["init_from"]
    facts = {
        "command": sys.argv,
        "layout": str(layout),
        "steps": run.end(config)[0],
        "versions": versions(),
        "computing": computing,
        "init_from": init_from,
    }
    write_file(folder / "config.toml", dump_run(config))
    write_file(folder / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
    write_file(folder / "run.json", json.dumps(facts, indent=2) + "\n")


def open_log(config: RunConfig, run: RunState, writer: bool) -> RunLog:
    """The run's log, cut back to where the run goes on; `writer` on one rank alone."""
    return RunLog(
        Path(config.output),
        total_tokens=run.end(config)[1],
        resume_tokens=run.tokens,
        resume_step=run.step,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        every_steps=config.log.every_steps,
        batch=config.schedule.batch,
        writer=writer,
    )


def finished(config: RunConfig, of_any_recipe: bool = False) -> bool:
    """Whether the run folder's newest checkpoint is the run's end, so that no rank need start. One
    of another recipe or other data is not: ranks that start refuse it, key by key."""
    folders = list_checkpoints(Path(config.output))
    try:
        if not folders or read_record(folders[-1]).tokens < config.schedule.total_tokens:
            return False
        return of_any_recipe or _same_run(load_run(folders[-1] / CONFIG), config)
    except MegagptError:
        # Training names what is damaged, and sets it aside.
        return False


def _same_run(saved: RunConfig, asked: RunConfig) -> bool:
    """Whether recipe and data are the same; how far either goes is no matter."""
    keys = {change.partition(":")[0] for change in differences(saved, asked)}
    data = [(config.data.train, config.data.changes) for config in (saved, asked)]
    return data[0] == data[1] and keys <= {"schedule.total_tokens", "schedule.decay_tokens"}


def summary(config: RunConfig) -> str:
    """What a finished run reached and where everything is, from its own record."""
    records = read_metrics(Path(config.output))
    steps = [r for r in records if "loss" in r]
    if not steps:
        return f"run complete; {config.output} has no record of its steps any more"
    # A record may have lost lines; of evaluations only what is there is told.
    saved = list_checkpoints(Path(config.output))
    end = read_record(saved[-1]) if saved else None
    step, tokens = (end.step, end.tokens) if end else (steps[-1]["step"], steps[-1]["tokens"])
    # The first step of each session pays for its start.
    speed = statistics.median(r["tokens_per_s"] for r in steps)
    lines = [
        f"run complete: {tokens:,} tokens in {step} steps, {speed:,.0f} tokens/s (median step)"
    ]
    known = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
    ends = {"before": 0, "after": step}
    if told := [f"{known[at]:.4f} {word}" for word, at in ends.items() if at in known]:
        lines.append(f"validation loss: {', '.join(told)}")
    lines.append(f"checkpoints: {config.output}/checkpoints")
    if config.log.tensorboard:
        lines.append(f"curves: tensorboard --logdir {shlex.quote(config.output + '/tensorboard')}")
    folder = shlex.quote(config.output)
    writes = f"next: megagpt generate {folder} --prompt TEXT      what it writes"
    if config.model.start_token is not None:
        writes = f"next: {folder}/samples                         what it draws (evaluate.samples)"
    # Where less was asked for now, what was trained says how long the rate fell.
    with contextlib.suppress(MegagptError):
        config = load_run(saved[-1] / CONFIG) if saved else config
    lines += [
        writes,
        f"      megagpt report {folder}                      its curves as a page",
        f"      megagpt export {folder} DIR --format hf      for transformers",
        "to train longer, raise schedule.total_tokens and run again with --allow-changes; set "
        f"schedule.decay_tokens = {config.schedule.decay_tokens or config.schedule.total_tokens} "
        "to keep the learning rate low",
    ]
    return "\n".join(lines)

"""megagpt verify-resume RUN.toml: is a run that was stopped the run that was not? (L3)

A miniature of the run (its data, layout, precision, dropout, optimizer and seed) is trained for 2n
steps, and again for n steps, stopped, started anew and trained to the end, by real processes on
this machine. Every step's record and the final weights and moments must agree bit for bit.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from megagpt.check.parity import launch, miniature
from megagpt.checkpoint.record import CheckpointRecord, list_checkpoints, read_record
from megagpt.config import RunConfig, dump_run, load_run
from megagpt.errors import EXIT_FAILURE, EXIT_OK, UsageError
from megagpt.log.metrics import read_metrics
from megagpt.plan.layout import layout_of, layout_problems

EXACT = ("step", "tokens", "samples", "batch_tokens", "loss", "grad_norm", "lr", "digest")
"""What a step's record says of the training; the rest is time."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    made = commands.add_parser(
        "verify-resume",
        help="train a run file with and without a restart and compare every bit",
        description=__doc__.split("\n\n")[1],
        epilog="Exit codes: 0 the same; 1 different; 2 wrong usage or configuration.",
    )
    made.add_argument("file", metavar="RUN.toml", help="run file; its shards must be prepared")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of a key")
    made.add_argument(
        "--steps", type=int, default=10, help="steps before the restart, n (default: %(default)s)"
    )
    made.add_argument(
        "--ranks",
        type=int,
        help="processes on this machine (default: one for each part of pipeline x tensor)",
    )
    made.add_argument(
        "--full-shape", action="store_true", help="the run's own model, not a miniature of it"
    )
    made.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what was compared; exit code 1 when anything differs."""
    if args.steps < 1:
        raise UsageError(f"--steps {args.steps}: must be 1 or more")
    asked = load_run(args.file, args.overrides)
    ranks = args.ranks or asked.parallel.pipeline * asked.parallel.tensor
    config = shortened(asked, args.steps, args.full_shape)
    problems = list(layout_problems(config, layout_of(config, ranks)))
    if problems:
        raise UsageError(f"--ranks {ranks}: " + "; ".join(problems))
    n = config.schedule.n_steps // 2
    with tempfile.TemporaryDirectory(prefix="megagpt-verify-resume-") as folder:
        whole = train(config, Path(folder) / "whole", ranks)
        parts = train(config, Path(folder) / "parts", ranks, stop_after=n)
        rows = compare(whole, parts)
    split = f"{config.parallel.ds_config}, {config.parallel.dtype}, {ranks} rank(s)"
    print(f"{config.schedule.n_steps} steps against {n} + {config.schedule.n_steps - n}: {split}\n")
    for name, difference in rows.items():
        print(f"{name:<24}  {difference or 'the same, bit for bit'}")
    return EXIT_FAILURE if any(rows.values()) else EXIT_OK


def shortened(config: RunConfig, n: int, full_shape: bool) -> RunConfig:
    """The run cut down to about 2n steps, over a ramp of the batch, split as the run is."""
    short = miniature(config, 2 * n, config.parallel.dtype, full_shape)
    # A GPU's fast kernels round differently each time; on a CPU the mode changes nothing.
    parallel = dataclasses.replace(
        short.parallel,
        pipeline=config.parallel.pipeline,
        tensor=config.parallel.tensor,
        deterministic=True,
    )
    # The default of a run that saves in the background is what must resume exactly.
    checkpoint = dataclasses.replace(short.checkpoint, stop_after_minutes=0.0)
    return dataclasses.replace(short, parallel=parallel, checkpoint=checkpoint)


def train(
    config: RunConfig, output: Path, ranks: int, stop_after: int = 0
) -> tuple[list[dict[str, Any]], CheckpointRecord]:
    """Trains to the end, with a stop and a new start after `stop_after` steps; what is left."""
    checkpoint = dataclasses.replace(config.checkpoint, stop_after_steps=stop_after)
    own = dataclasses.replace(config, output=str(output), checkpoint=checkpoint)
    file = output.with_suffix(".toml")
    file.write_text(dump_run(own), encoding="utf-8")
    command = ["-m", "megagpt.train", str(file)]
    if stop_after:
        launch(command, ranks, stops=True)
    # The rest may be one step longer than the first part.
    launch([*command, "checkpoint.stop_after_steps=0"], ranks)
    steps = [record for record in read_metrics(output) if "loss" in record]
    return steps, read_record(list_checkpoints(output)[-1])


def compare(
    whole: tuple[list[dict[str, Any]], CheckpointRecord],
    parts: tuple[list[dict[str, Any]], CheckpointRecord],
) -> dict[str, str]:
    """What was compared -> how it differs, "" where it does not."""
    return {
        **{key: _differing_step(whole[0], parts[0], key) for key in EXACT},
        "weights and moments": _differing_files(whole[1], parts[1]),
        "updates": _pair(whole[1].updates, parts[1].updates),
        "loss scale": _pair(whole[1].loss_scale, parts[1].loss_scale),
    }


def _differing_step(a: list[dict[str, Any]], b: list[dict[str, Any]], key: str) -> str:
    if len(a) != len(b):
        return f"{len(a)} steps -> {len(b)}"
    for x, y in zip(a, b, strict=True):
        # repr, so that NaN is the same as NaN.
        if repr(x[key]) != repr(y[key]):
            return f"DIFFERS from step {x['step']} on: {x[key]!r} -> {y[key]!r}"
    return ""


def _differing_files(a: CheckpointRecord, b: CheckpointRecord) -> str:
    """The checksums of the ranks' files: the same layout writes the same bytes."""
    sums = [{f.name: f.sha256 for f in m.files if f.name.startswith("rank_")} for m in (a, b)]
    names = [name for name in sums[0] if sums[0][name] != sums[1].get(name)]
    return f"DIFFER: {', '.join(names)}" if names else ""


def _pair(a: object, b: object) -> str:
    return "" if a == b else f"DIFFERS: {a!r} -> {b!r}"

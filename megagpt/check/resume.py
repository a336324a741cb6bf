"""megagpt verify-resume RUN.toml: is a run that was stopped the run that was not? (L3)

A miniature of the run (its data, layout, precision, dropout, optimizer and seed) is trained for 2n
steps, and again for n steps, stopped, started anew and trained to the end, by real processes on
this machine. Every step's record and the final weights and moments must agree bit for bit.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megagpt.check.parity import changed, miniature, train
from megagpt.checkpoint.record import CheckpointRecord, list_checkpoints, read_record
from megagpt.config import RunConfig, add_overrides, load_run
from megagpt.errors import EXIT_FAILURE, EXIT_OK, UsageError
from megagpt.plan.layout import layout_of, layout_problems

EXACT = ("step", "tokens", "samples", "batch_tokens", "loss", "grad_norm", "lr", "digest")
"""What a step's record says of the training; the rest is time."""
Outcome = tuple[list[dict[str, Any]], CheckpointRecord]
"""Records of all steps of a run, and its last checkpoint."""


def add_options(made: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    made.description = __doc__.split("\n\n")[1]
    made.epilog = (
        "Exit codes: 0 the same; 1 different; 2 wrong usage or configuration; 3 damaged input."
    )
    made.add_argument("file", metavar="RUN.toml", help="run file; its shards must be prepared")
    add_overrides(made)
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
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        steps = config.schedule.n_steps
        _say(f"1 of 3: {steps} steps without a break on {ranks} rank(s)")
        expected = train(config, whole, ranks)
        _say(f"2 of 3: {n} steps, then stopped")
        train(config, parts, ranks, f"checkpoint.stop_after_steps={n}", stops=True)
        # The rest may be one step longer than the first part.
        _say(f"3 of 3: {steps - n} steps from the checkpoint on")
        records = train(config, parts, ranks)
        _say("comparing")
        states = [read_record(list_checkpoints(output)[-1]) for output in (whole, parts)]
    rows = compare((expected, states[0]), (records, states[1]))
    split = f"{config.parallel.ds_config}, {config.parallel.dtype}, {ranks} rank(s)"
    print(f"{config.schedule.n_steps} steps against {n} + {config.schedule.n_steps - n}: {split}\n")
    for name, difference in rows.items():
        print(f"{name:<24}  {difference or 'the same, bit for bit'}")
    return EXIT_FAILURE if any(rows.values()) else EXIT_OK


def _say(text: str) -> None:
    """A line that shows that the command is working; its results go to stdout."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def shortened(config: RunConfig, n: int, full_shape: bool) -> RunConfig:
    """The run cut down to about 2n steps, over a ramp of the batch, split as the run is."""
    short = miniature(config, 2 * n, config.parallel.dtype, full_shape)
    return changed(
        short,
        # A GPU's fast kernels round differently each time; on a CPU the mode changes nothing.
        parallel={
            "pipeline": config.parallel.pipeline,
            "tensor": config.parallel.tensor,
            "deterministic": True,
        },
        # The default of a run that saves in the background is what must resume exactly.
        checkpoint={"stop_after_minutes": 0.0, "stop_after_steps": 0},
    )


def compare(expected: Outcome, outcome: Outcome) -> dict[str, str]:
    """What was compared -> how it differs, "" where it does not."""
    (steps, state), (other_steps, other_state) = expected, outcome
    rows = dict.fromkeys(EXACT, "")
    if len(steps) != len(other_steps):
        rows = dict.fromkeys(EXACT, f"{len(steps)} steps -> {len(other_steps)}")
    for a, b in zip(steps, other_steps, strict=False):
        for key in EXACT:
            # repr, so that NaN is the same as NaN.
            if not rows[key] and repr(a[key]) != repr(b[key]):
                rows[key] = f"DIFFERS from step {a['step']} on: {a[key]!r} -> {b[key]!r}"
    # The same layout writes the same bytes.
    sums, other_sums = (
        {file.name: file.sha256 for file in record.files if file.name.startswith("rank_")}
        for record in (state, other_state)
    )
    files = [name for name in sums if sums[name] != other_sums.get(name)]
    rows["weights and moments"] = f"DIFFER: {', '.join(files)}" if files else ""
    for name in ("updates", "loss_scale"):
        a, b = getattr(state, name), getattr(other_state, name)
        rows[name.replace("_", " ")] = "" if a == b else f"DIFFERS: {a!r} -> {b!r}"
    return rows

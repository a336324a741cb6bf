"""megagpt parity RUN.toml: the same training under every layout, compared step by step (L3).

A miniature of the run (few layers, narrow, short context, no dropout; its data, attention,
optimizer and seed) is trained in one process, then under ZeRO 0-3, offload, pipeline and tensor
splits, by real processes on this machine. Losses and gradient norms must agree at every step of a
ramp that changes the batch and the micro-batch several times and leaves some ranks idle, with
clipping, weight decay and tied embeddings on.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.config import Dtype, RunConfig, add_overrides, dump_run, load_run
from megagpt.corpus.manifest import read_manifest
from megagpt.errors import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_STOPPED,
    DamageError,
    MegagptError,
    UnsoundError,
    UsageError,
)
from megagpt.log.metrics import read_metrics

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
"""Largest relative difference of a loss that is rounding. Of a gradient norm it is ten times that:
DeepSpeed adds up the squares of each rank's stretch in fp32, so the cut shows a little."""
SEQUENCES = 6
"""Of the first batch, by which it grows to four times as many. Two data ranks share each batch, in
micro-batches of 3 or 4; four ranks cannot share the first and the third."""
MICRO_BATCH = 4
"""Sequences at most; the reference takes one after another."""
PEAK_LR = 1e-3
"""Largest peak learning rate of the miniature: near instability rounding grows without bound."""


REFERENCE = "one process"
CASES = {
    REFERENCE: (1, "zero1", 1, 1),
    "ZeRO-0 x2": (2, "zero0", 1, 1),
    "ZeRO-1 x2": (2, "zero1", 1, 1),
    "ZeRO-2 x2": (2, "zero2", 1, 1),
    "ZeRO-3 x2": (2, "zero3", 1, 1),
    "ZeRO-1 x4": (4, "zero1", 1, 1),
    "ZeRO-3 offload x2": (2, "zero3_offload", 1, 1),
    "PP2": (2, "pipeline", 2, 1),
    "PP2 x DP2": (4, "pipeline", 2, 1),
    "TP2": (2, "pipeline", 1, 2),
    "TP2 x PP2": (4, "pipeline", 2, 2),
}
"""Layout -> (ranks, parallel.ds_config, pipeline, tensor); each is compared with the reference."""
NAMES = [name for name in CASES if name != REFERENCE]


def add_options(made: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    made.description = __doc__.split("\n\n")[1]
    made.add_argument("file", metavar="RUN.toml", help="run file; its shards must be prepared")
    add_overrides(made)
    made.add_argument("--steps", type=int, default=30, help="steps (default: %(default)s)")
    made.add_argument("--dtype", choices=list(TOLERANCE), default="fp32", help="default: fp32")
    made.add_argument(
        "--full-shape", action="store_true", help="the run's own model, not a miniature of it"
    )
    made.add_argument(
        "--only", metavar="NAME", action="append", help=f"one of: {', '.join(NAMES)}; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table; exit code 1 when a layout is beyond the tolerance."""
    unknown = set(args.only or ()) - set(NAMES)
    if unknown:
        raise UsageError(f"--only {unknown.pop()!r}: must be one of {', '.join(NAMES)}")
    config = miniature(load_run(args.file, args.overrides), args.steps, args.dtype, args.full_shape)
    # Its masks are drawn for each data rank and stage, so that no two layouts share them.
    config = changed(config, model={"dropout": 0.0})
    # The trainer refuses ZeRO-0 in 16 bits: see megagpt.plan.ds_config.
    possible = [name for name in NAMES if args.dtype == "fp32" or CASES[name][1] != "zero0"]
    names = [name for name in possible if not args.only or name in args.only]
    allowed = TOLERANCE[args.dtype]
    sound = True
    with tempfile.TemporaryDirectory(prefix="megagpt-parity-") as folder:
        expected = train_case(config, REFERENCE, Path(folder))
        print(f"{len(expected)} steps, {args.dtype}, against {REFERENCE}; relative to it:\n")
        print(f"{'layout':<18}  {'loss':>8}  {'grad norm':>9}")
        for name in names:
            loss, grad_norm = differences(expected, train_case(config, name, Path(folder)))
            good = loss <= allowed and grad_norm <= 10 * allowed
            sound = sound and good
            verdict = "" if good else f"  DIFFERS (allowed {allowed:g})"
            print(f"{name:<18}  {loss:8.1e}  {grad_norm:9.1e}{verdict}", flush=True)
    return EXIT_OK if sound else EXIT_FAILURE


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The run with other values of some keys: section={key: value}."""
    made = {
        name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()
    }
    return dataclasses.replace(config, **made)


def miniature(config: RunConfig, steps: int, dtype: Dtype, full_shape: bool = False) -> RunConfig:
    """The run cut down to a size that every layout trains in seconds, about `steps` steps."""
    # The mixture with which the run begins: its changes lie beyond the miniature's end.
    train = tuple(source for source in config.data.train if source.weight)
    model: dict[str, Any] = {}
    if not full_shape:
        model = {"n_layer": 4, "n_head": 4, "d_model": 64, "band_width": 16}
        # A record is one window, and cannot be cut.
        if not any(read_manifest(source.path).record_length for source in train):
            model["n_ctx"] = min(64, config.model.n_ctx)
    start = SEQUENCES * model.get("n_ctx", config.model.n_ctx)
    # Batches of 1, 2, 3 and then 4 starts: ramp steps, then the rest at the full batch.
    total = int(steps * 2.5 * start)
    return changed(
        config,
        model=model,
        schedule={
            "total_tokens": total,
            "warmup_tokens": total // 10,
            "decay_tokens": total * 9 // 10,
            "batch_tokens": 4 * start,
            "ramp_start_tokens": start,
            "ramp_increment_tokens": start,
            "ramp_tokens": total // 2,
            "peak_lr": min(PEAK_LR, config.schedule.peak_lr),
        },
        parallel={"micro_batch": MICRO_BATCH, "dtype": dtype, "pipeline": 1, "tensor": 1},
        data={"train": train, "changes": (), "validation": ()},
        checkpoint={"every_tokens": 0, "keep_every_tokens": 0},
        log={"tensorboard": False},
    )


def train_case(config: RunConfig, name: str, folder: Path) -> list[dict[str, Any]]:
    """Trains one layout; its steps' records."""
    ranks, ds_config, pipeline, tensor = CASES[name]
    parallel = {"ds_config": ds_config, "pipeline": pipeline, "tensor": tensor}
    if name == REFERENCE:
        parallel["micro_batch"] = 1
    return train(changed(config, parallel=parallel), folder / name.replace(" ", "-"), ranks)


def train(
    config: RunConfig, output: Path, ranks: int, *overrides: str, stops: bool = False
) -> list[dict[str, Any]]:
    """Trains in processes of its own, in the run folder `output`; its steps' records so far.

    stops: see launch.
    """
    file = output.with_name(f"{output.name}.toml")
    file.write_text(dump_run(dataclasses.replace(config, output=str(output))), encoding="utf-8")
    launch(["-m", "megagpt.train", str(file), *overrides], ranks, stops)
    return [record for record in read_metrics(output) if "loss" in record]


def launch(command: Sequence[str], ranks: int, stops: bool = False) -> None:
    """Runs python with `command` on `ranks` processes of this machine; raises the error of its exit
    code when it fails.

    stops: it should end early with exit code 75, of which torchrun makes a 1 and says so.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else []), *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    stopped = done.returncode == EXIT_STOPPED or f"exitcode  : {EXIT_STOPPED}" in done.stderr
    if not stopped if stops else done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-30:])
        kind = {one.exit_code: one for one in (UsageError, DamageError, UnsoundError)}
        error = kind.get(done.returncode, MegagptError)
        raise error(f"training on {ranks} ranks ended with {done.returncode}:\n{tail}")


def differences(
    expected: list[dict[str, Any]], records: list[dict[str, Any]]
) -> tuple[float, float]:
    """The largest relative differences of a step's loss and gradient norm.

    Raises MegagptError where the steps are not the same.
    """
    steps, others = (
        [(r["step"], r["tokens"], r["lr"], r["digest"]) for r in run] for run in (expected, records)
    )
    if steps != others:
        raise MegagptError("the layouts did not take the same steps over the same samples")
    loss, grad_norm = (
        max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(expected, records, strict=True))
        for key in ("loss", "grad_norm")
    )
    return loss, grad_norm

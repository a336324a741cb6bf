"""A fault campaign: one element of one rank's weights or moments goes wrong in the middle of a run.

    python -m tests.lib.wild --trials 100 --layout zero1 --seed 1 --output DIR

Each trial trains the same small run on two ranks and, after a step, at a place, on a rank and in a
way that are all drawn, changes one number: to NaN or an infinity, its sign, or one bit of its
exponent. The run must end at the fault, with no checkpoint that differs from those of the calm run
in any bit; the same command again must then end as the calm run did. What no look can tell from
training is counted as believed, with what it did to the last loss. Prints one JSON object.
"""

import argparse
import collections
import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint import list_checkpoints
from megagpt.cluster.process import join, leave, prepare_environment
from megagpt.cluster.ranks import Ranks, discover
from megagpt.cluster.stop import StopRequest
from megagpt.config import load_run
from megagpt.engine import StepResult
from megagpt.engine.slices import STATES
from megagpt.errors import DamageError, MegagptError, UnsoundError
from megagpt.log import read_metrics
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import layout_of
from tests.lib.corpus import run_file
from tests.lib.distributed import digest_of_checkpoint, free_port, run_together

KINDS = ("nan", "inf", "sign", "exponent")
LAYOUTS = {
    "zero1": ("zero1", 1, 1),
    "zero3": ("zero3", 1, 1),
    "pp2": ("pipeline", 2, 1),
    "tp2": ("pipeline", 1, 2),
}
STEPS = 12
RUN: dict[str, dict[str, object]] = {
    "schedule": {"total_tokens": STEPS * 256, "warmup_tokens": 0, "batch_tokens": 256}
    | {"ramp_start_tokens": 0, "ramp_tokens": 0},
    "optimizer": {"max_skipped_steps": 3},
    "checkpoint": {"every_tokens": 3 * 256, "keep_last": 99},
    "evaluate": {"every_tokens": 0, "batches": 1},
    "log": {"tensorboard": False, "every_steps": 1_000_000},
}
Fault = dict[str, Any]


def drawn(draw: random.Random, kinds: tuple[str, ...] = KINDS) -> Fault:
    """Where, when and how a number goes wrong."""
    return {
        "step": draw.randint(1, STEPS),
        "rank": draw.randint(0, 1),
        "key": draw.choice(STATES),
        "kind": draw.choice(kinds),
        "bit": draw.randint(23, 30),
        "piece": draw.random(),
        "place": draw.random(),
    }


def changed(value: float, fault: Fault) -> float:
    """What becomes of a number."""
    if fault["kind"] == "exponent":
        bits = torch.tensor([value], dtype=torch.float32).view(torch.int32)
        return float((bits ^ (1 << fault["bit"])).view(torch.float32))
    return {"nan": math.nan, "inf": math.inf, "sign": -value}[fault["kind"]]


def train(file: Path, output: Path, layout_name: str, ranks: Ranks, fault: Fault | None) -> str:
    """One start of the run; the name of the error that ended it, "" at its end."""
    from megagpt.loop import Trainer
    from megagpt.run.state import RunState, Step

    class Wild(Trainer):
        """Training on hardware that changes a number once."""

        def train_step(self, run: RunState, step: Step) -> StepResult:
            result = super().train_step(run, step)
            if fault and (step.number, self.ranks.rank) == (fault["step"], fault["rank"]):
                pieces = list(self.engine.slices())
                piece = pieces[int(fault["piece"] * len(pieces))]
                values = piece.read(fault["key"]).detach().clone()
                place = int(fault["place"] * piece.numel)
                values[place] = changed(float(values[place]), fault)
                piece.write(fault["key"], values)
            return result

    name, pipeline, tensor = LAYOUTS[layout_name]
    split = [f"parallel.pipeline={pipeline}", f"parallel.tensor={tensor}"]
    config = load_run(file, [f"output={output}", f"parallel.ds_config={name}", *split])
    if ranks.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
    layout = layout_of(config, ranks.world)
    trainer = Wild(config, layout, ranks, resolve(config, layout, read_ds_config(name)))
    trainer.engine.barrier()
    try:
        with StopRequest() as stop:
            trainer.run(stop, allow_changes=False)
    except (UnsoundError, DamageError) as error:
        return type(error).__name__
    finally:
        trainer.close()
    return ""


def digests(run: Path) -> dict[str, str]:
    return {folder.name: digest_of_checkpoint(folder) for folder in list_checkpoints(run)}


def last_loss(run: Path) -> float:
    return float([r["loss"] for r in read_metrics(run) if "loss" in r][-1])


def campaign(file: Path, root: Path, layout: str, faults: list[Fault]) -> list[Fault]:
    """Runs the faults one after another on this rank; what became of each, on rank 0."""
    ranks = discover(os.environ)
    prepare_environment(ranks, os.environ)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    join(ranks)
    assert train(file, root / "calm", layout, ranks, None) == ""
    calm = digests(root / "calm")
    for number, fault in enumerate(faults):
        output = root / f"trial-{number}"
        fault["error"] = train(file, output, layout, ranks, fault)
        saved = digests(output)
        fault["wrong_saved"] = sum(calm[name] != digest for name, digest in saved.items())
        if fault["error"]:
            ended = train(file, output, layout, ranks, None)
            fault["recovered"] = ended == "" and digests(output)[max(calm)] == calm[max(calm)]
        fault["loss_change"] = abs(last_loss(output) / last_loss(root / "calm") - 1)
        if ranks.rank == 0:
            print(number, fault, file=sys.stderr, flush=True)
    leave()
    return faults


def table(faults: list[Fault]) -> dict[str, Any]:
    """Counts by kind and state; found: it ended, recovered, and nothing wrong was saved."""
    rows: dict[str, collections.Counter[str]] = {}
    for fault in faults:
        row = rows.setdefault(f"{fault['kind']} {fault['key']}", collections.Counter())
        row["tried"] += 1
        if fault["error"]:
            row["found" if fault["recovered"] and not fault["wrong_saved"] else "lost"] += 1
        else:
            row["believed" if fault["wrong_saved"] else "without a trace"] += 1
    believed = [f["loss_change"] for f in faults if not f["error"]]
    total = sum(rows.values(), collections.Counter())
    return {
        "rows": {name: dict(row) for name, row in sorted(rows.items())},
        "total": dict(total),
        "largest change of the last loss by what was believed": max(believed, default=0.0),
    }


def ordered(root: Path, layout: str, faults: list[Fault]) -> list[Fault]:
    """What became of the faults, tried by two ranks under torchrun."""
    file, plan = run_file(root, **RUN), root / "faults.json"
    plan.write_text(json.dumps(faults))
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    words = [str(file), layout, str(plan)]
    place = [f"--master-port={free_port()}", "-m", "tests.lib.wild", "--rank", *words]
    done = run_together([*line, *place], timeout_s=60 + 30 * len(faults))
    if done.returncode:
        raise MegagptError(done.stderr[-4000:])
    return list(json.loads(plan.with_suffix(".done").read_text()))


def main() -> int:
    if sys.argv[1] == "--rank":
        file, layout, plan = Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
        found = campaign(file, file.parent / layout, layout, json.loads(plan.read_text()))
        if os.environ["RANK"] == "0":
            plan.with_suffix(".done").write_text(json.dumps(found))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=100, help="faults (default: %(default)s)")
    parser.add_argument("--layout", choices=LAYOUTS, default="zero1")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="new folder for all files")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    draw = random.Random(args.seed)
    faults = [drawn(draw) for _ in range(args.trials)]
    found = table(ordered(args.output.resolve(), args.layout, faults))
    print(json.dumps(found, indent=1))
    return 1 if found["total"].get("lost") else 0


if __name__ == "__main__":
    sys.exit(main())

"""A training end to end with the trainer's own command: MFU and times of metrics.jsonl.

    python -m benchmarks.gpu_check.train train.125m

The run is ended once its steps are recorded: the checkpoint at its end would take longer than they.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu_check.data import corpus, work
from benchmarks.gpu_check.items import MICRO_BATCHES, N_CTX, TINY, TINY_N_CTX, TRAININGS, Training
from benchmarks.gpu_check.results import record, seconds_left
from megagpt.log import read_metrics
from tests.lib.distributed import ROOT, kill_all, start

MEDIANS = (
    "mfu",
    "tokens_per_s",
    "step_s",
    "data_s",
    "forward_s",
    "backward_s",
    "optimizer_s",
    "communication_s",
)


def overrides(training: Training, run: Path, tiny: bool) -> list[str]:
    """What is other than in the preset's run file."""
    micro_batch, n_ctx = (2, TINY_N_CTX) if tiny else (training.micro_batch, N_CTX)
    batch = MICRO_BATCHES * micro_batch * n_ctx
    return [
        f"output={run}",
        f'data.train=[{{path = "{corpus("bytes" if tiny else "gpt2")}"}}]',
        "data.validation=[]",
        "data.verify=false",
        # One step more than is waited for: the run ends by a kill, not by a checkpoint.
        f"schedule.total_tokens={batch * (training.steps + 1)}",
        f"schedule.batch_tokens={batch}",
        "schedule.ramp_start_tokens=0",
        "schedule.ramp_tokens=0",
        f"schedule.warmup_tokens={batch}",
        f"schedule.decay_tokens={batch * (training.steps + 1)}",
        f"parallel.micro_batch={micro_batch}",
        "checkpoint.every_tokens=0",
        "evaluate.every_tokens=0",
        "log.details_every_steps=0",
        "log.tensorboard=false",
        "log.watchdog_minutes=5",
        *(TINY if tiny else ()),
        # DeepSpeed refuses fp16 on a CPU.
        *(o for o in training.overrides if not (tiny and o.endswith("fp16"))),
    ]


def steps(run: Path) -> list[dict]:
    """Records of the steps so far."""
    path = run / "metrics.jsonl"
    return [r for r in read_metrics(run) if "loss" in r] if path.exists() else []


def main(name: str) -> None:
    """Train, watch, kill, record."""
    training = next(t for t in TRAININGS if f"train.{t.name}" == name)
    run = work() / name
    shutil.rmtree(run, ignore_errors=True)
    file = ROOT / f"launch/runs/gpt3-{training.size}.toml"
    arguments = overrides(training, run, tiny=os.environ["DEVICE"] == "cpu")
    print(*watched(start(file, 1, *arguments, launcher="python"), run, training.steps), sep="\n")
    found = steps(run)
    chosen = run / "run.json"
    computing = json.loads(chosen.read_text()).get("computing") if chosen.exists() else None
    shutil.rmtree(run, ignore_errors=True)
    facts = {"steps": len(found), "computing": computing, **summary(found)}
    record("train", name=training.name, **facts)
    if not found:
        sys.exit(f"{name}: no step")


def watched(process: subprocess.Popen[str], run: Path, count: int) -> tuple[str, str]:
    """What a training said until so many steps of it are recorded; then it is killed."""
    with ThreadPoolExecutor(1) as pool:
        # Read meanwhile: a training whose pipe is full waits for its reader.
        said = pool.submit(process.communicate)
        try:
            while process.poll() is None and len(steps(run)) < count and seconds_left() > 4:
                time.sleep(0.05)
        finally:
            kill_all(process)
        return said.result()


def summary(found: list[dict]) -> dict[str, object]:
    """Medians over the second half of the steps, which is past compiling and warming up."""
    if not found:
        return {}
    late = found[len(found) // 2 :]
    medians = {
        key: statistics.median(r[key] for r in late)
        for key in MEDIANS
        if all(key in r for r in late)
    }
    return {
        **medians,
        "first_step_s": found[0]["step_s"],
        "peak_bytes": max(r.get("memory_peak_bytes", 0) for r in found),
        "first_loss": found[0]["loss"],
        "last_loss": found[-1]["loss"],
        "skipped_steps": found[-1]["skipped_steps"],
    }


if __name__ == "__main__":
    main(sys.argv[1])

"""Made-up records of runs, written by RunLog and read back."""

import signal
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt.log import RunLog, read_metrics

BATCH = 1000
ROOT = Path(__file__).resolve().parents[2]


def record(step: int, loss: float | None = None) -> dict:
    return {
        "step": step,
        "tokens": step * BATCH,
        "samples": step * 10,
        "loss": 5.0 / step if loss is None else loss,
        "lr": 1e-3,
        "batch_tokens": BATCH,
        "grad_norm": 0.5,
        "tokens_per_s": 2000.0,
    }


def open_log(folder: Path, resume_step: int = 0, **options) -> RunLog:
    options.setdefault("console", "off")
    return RunLog(
        folder,
        total_tokens=100 * BATCH,
        resume_tokens=resume_step * BATCH,
        resume_step=resume_step,
        **options,
    )


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def steps(folder: Path) -> list[dict]:
    return [line for line in read_metrics(folder) if "loss" in line]


KILLED = """
import sys, time
from tests.lib.recorded import open_log, record
log = open_log(__import__("pathlib").Path(sys.argv[1]), int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 1, 10_000):
    log.step(record(step))
    if step % 4 == 0:
        log.evaluation({"step": step, "tokens": step * 1000, "validation_loss": 7.0 / step})
    print(step, flush=True)
"""


def run_until_killed(folder: Path, resume_step: int, kill_after: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(resume_step)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= kill_after:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()

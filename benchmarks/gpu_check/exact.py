"""Three gates of exactness on one device: the same run twice, resume after a kill, another layout.

    python -m benchmarks.gpu_check.exact

The quickstart's model, with and without parallel.deterministic; a gate is passed when the records
of all steps and the final checkpoint agree bit for bit. Trainings share the device: they are small.
"""

import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.gpu_check.data import corpus, work
from benchmarks.gpu_check.items import GATES, MODES, TINY
from benchmarks.gpu_check.results import first_line, record, seconds_left
from benchmarks.gpu_check.train import watched
from tests.lib.distributed import ROOT, digest_of_weights, exact, start, steps, trained

FILE = ROOT / "launch/runs/quickstart.toml"
KILLED_AT = {"cuda": 13, "cpu": 10}
"""Step after which a run is killed, between two checkpoints."""
VARIANTS = {
    "whole": (),
    "again": (),
    "killed": (),
    "zero2": ("parallel.ds_config=zero2",),
    "zero3": ("parallel.ds_config=zero3",),
}


def overrides(run: Path, tiny: bool) -> list[str]:
    """What is other than in the quickstart."""
    part = 2 if tiny else 1
    return [
        f"output={run}",
        f'data.train=[{{path = "{corpus("bytes")}"}}]',
        "data.validation=[]",
        f"schedule.total_tokens={90_000 // part}",
        f"schedule.ramp_tokens={30_000 // part}",
        f"schedule.warmup_tokens={10_000 // part}",
        f"schedule.decay_tokens={80_000 // part}",
        f"checkpoint.every_tokens={20_000 // part}",
        "evaluate.samples=0",
        "log.tensorboard=false",
        "log.watchdog_minutes=5",
        "model.vocab_size=257",
        *((*TINY, "parallel.micro_batch=16") if tiny else ()),
    ]


def run_variant(mode: str, variant: str) -> Path:
    """Train one variant to its end; the run folder."""
    run = work() / f"exact-{mode}-{variant}"
    shutil.rmtree(run, ignore_errors=True)
    arguments = overrides(run, os.environ["DEVICE"] == "cpu")
    arguments += [*MODES[mode], *VARIANTS[variant]]
    if variant == "killed":
        process = start(FILE, 1, *arguments, launcher="python")
        said = watched(process, run, KILLED_AT[os.environ["DEVICE"]])
        assert process.returncode == -signal.SIGKILL, f"had ended before it was killed: {said}"
    trained(FILE, 1, *arguments, launcher="python", timeout_s=seconds_left())
    return run


def compare(run: Path, other: Path) -> dict[str, object]:
    """How two runs of the same steps differ."""
    ours, theirs = steps(run), steps(other)
    pairs = list(zip(exact(ours), exact(theirs), strict=True))
    losses = [(a["loss"], b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    return {
        "steps": len(pairs),
        "first_different_step": next((a[0] for a, b in pairs if a != b), None),
        "largest_loss_difference": max(abs(a - b) for a, b in losses),
        "weights_equal": digest_of_weights(run) == digest_of_weights(other),
    }


def main() -> int:
    """All variants, several at a time; a gate is recorded as soon as both its runs are there."""
    runs: dict[tuple[str, str], Path] = {}
    open_gates = [(m, g, v) for m in MODES for g, v in zip(GATES, list(VARIANTS)[1:], strict=True)]
    failed = 0
    # A GPU's host has cores enough for all; two of a CPU's are busy with two.
    with ThreadPoolExecutor(2 if os.environ["DEVICE"] == "cpu" else 10) as pool:
        wanted = [(mode, variant) for mode in MODES for variant in VARIANTS]
        waiting = {pool.submit(run_variant, *pair): pair for pair in wanted}
        for done in as_completed(waiting):
            mode, variant = waiting[done]
            try:
                runs[mode, variant] = done.result()
            except (AssertionError, OSError) as error:
                failed += 1
                record("failure", item="exact", run=f"{mode} {variant}", error=first_line(error))
                print(error)
            for gate in list(open_gates):
                mode, text, other = gate
                if (mode, "whole") in runs and (mode, other) in runs:
                    open_gates.remove(gate)
                    found = compare(runs[mode, "whole"], runs[mode, other])
                    record("exact", mode=mode, gate=text, **found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

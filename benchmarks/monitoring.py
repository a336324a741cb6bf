"""What watching a run costs: its record, and what is measured around a step.

    python benchmarks/monitoring.py record [--steps 2000] [--sources 4] [--layers 12]
    python benchmarks/monitoring.py meter [--steps 40] [--run RUN.toml] [section.key=value ...]

record: writes a run with the figures that the trainer reports to a temporary folder; microseconds
that a step waits for its record (median and 99th percentile), CPU time of a step, which other
programs do not change, bytes written, and the shortest step of which the wait is under 1%. meter:
trains for real in one process, every second step with per-layer statistics; what the meter takes of
every step and what these statistics add to one, in CPU time of the process. It needs the run's data
(make quickstart prepares data/python-stdlib).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from megagpt.log import RunLog

ROOT = Path(__file__).resolve().parents[1]


def record(step: int, sources: int, layers: int) -> dict:
    """A step as rich as the trainer's; every hundredth with per-layer statistics."""
    plain = {
        "step": step,
        "tokens": step * 524_288,
        "samples": step * 256,
        "loss": 3.0 + 1.0 / step,
        "lr": 6.0e-4 / (1 + step / 1000),
        "batch_tokens": 524_288,
        "grad_norm": 0.7 + 0.1 / step,
        "tokens_per_s": 1.0e6 + step,
        "mfu": 0.41,
        "hfu": 0.43,
        "step_s": 0.524,
        "data_s": 0.001,
        "forward_s": 0.16,
        "backward_s": 0.32,
        "communication_s": 0.02,
        "optimizer_s": 0.02,
        "memory_allocated_bytes": 61_234_567_890,
        "memory_peak_bytes": 71_234_567_890,
        "memory_reserved_bytes": 72_234_567_890,
        "host_memory_bytes": 5_234_567_890,
        "skipped_steps": 0,
        "loss_scale": 65_536.0,
        "sources": {
            f"source-{i}": {"tokens": step * 131_072, "epochs": step / 1e4} for i in range(sources)
        },
    }
    if step % 100:
        return plain
    row = {f"h.{i}": 0.1 + i / step for i in range(layers)}
    norms = {name: row for name in ("parameter", "gradient", "update", "ratio")}
    activations = {name: row for name in ("rms", "largest", "zeros")}
    return plain | {"norms": norms, "activations": activations, "noise_scale_tokens": 1.2e6 + step}


def measure(
    folder: Path, args: argparse.Namespace, **options: object
) -> tuple[list[float], float, int]:
    """(seconds of each call of step, CPU seconds of the median one, bytes written)."""
    log = RunLog(
        folder,
        total_tokens=args.steps * 524_288,
        resume_tokens=0,
        resume_step=0,
        batch=lambda tokens: 524_288,
        **options,
    )
    elapsed_s, cpu_s = [], []
    for step in range(1, args.steps + 1):
        line = record(step, args.sources, args.layers)
        t0, cpu0 = time.perf_counter(), time.process_time()
        log.step(line)
        elapsed_s.append(time.perf_counter() - t0)
        cpu_s.append(time.process_time() - cpu0)
    log.close()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return elapsed_s, statistics.median(cpu_s), size


def records(args: argparse.Namespace) -> None:
    """Prints what the record costs."""
    rows = [
        ("metrics.jsonl", {"tensorboard": False, "console": "off"}),
        ("and TensorBoard", {"console": "off"}),
        ("and plain lines", {"console": "plain"}),
        ("and the bar, no lines", {"console": "bar"}),
        ("not the writing rank", {"writer": False}),
    ]
    print("| record | median us | 99% us | CPU us | bytes a step | under 1% of steps over |")
    print("|---|---|---|---|---|---|")
    for name, options in rows:
        with tempfile.TemporaryDirectory() as folder:
            elapsed_s, cpu_s, size = measure(Path(folder), args, **options)
        median = statistics.median(elapsed_s)
        worst = statistics.quantiles(elapsed_s, n=100)[98]
        print(
            f"| {name} | {1e6 * median:.0f} | {1e6 * worst:.0f} | {1e6 * cpu_s:.0f} "
            f"| {size / args.steps:.0f} | {1e5 * median:.1f} ms |",
            flush=True,
        )


def meter(args: argparse.Namespace) -> None:
    """Prints what the meter costs."""
    os.chdir(ROOT)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from benchmarks.engine import Ours
    from megagpt.cluster.process import join, leave, prepare_environment
    from megagpt.cluster.ranks import Ranks
    from megagpt.config import load_run
    from megagpt.loop import Trainer
    from megagpt.plan.ds_config import read_ds_config, resolve
    from megagpt.plan.layout import Layout

    with tempfile.TemporaryDirectory() as folder:
        # The largest batch from the start, so that all steps are alike.
        changes = ["schedule.ramp_start_tokens=0", "log.details_every_steps=2"]
        config = load_run(args.run, [f"output={folder}/run", *changes, *args.overrides])
        tree = resolve(config, Layout(), read_ds_config(config.parallel.ds_config))
        prepare_environment(Ranks(), os.environ)
        join(Ranks())
        Path(folder, "run").mkdir()
        trainer = Trainer(config, Layout(), Ranks(), tree)
        ours = Ours(trainer)
        inside = Stopwatch()
        trainer.meter.begin = inside.around(trainer.meter.begin)
        trainer.meter.end = inside.around(trainer.meter.end)
        steps: dict[bool, list[float]] = {False: [], True: []}
        own: list[float] = []
        for number in range(2 * args.steps + 4):
            inside.seconds, t0 = 0.0, time.process_time()
            ours.step()
            closer = number % 2 == 1
            if number >= 4:  # the first steps warm up
                steps[closer].append(time.process_time() - t0)
                own += [] if closer else [inside.seconds]
        trainer.close()
        leave()
    plain_s = statistics.median(steps[False])
    pairs = zip(steps[True], steps[False], strict=True)
    look_s = statistics.median(a - b for a, b in pairs)
    own_s = statistics.median(own)
    print(f"step                    {1e3 * plain_s:9.2f} ms of CPU time")
    print(f"the meter, every step   {1e3 * own_s:9.2f} ms  {own_s / plain_s:.2%} of it")
    print(f"per-layer statistics    {1e3 * look_s:9.2f} ms  {look_s / plain_s:.1%} of a step")
    print(f"one every 100 steps                   {look_s / plain_s / 100:.2%}")


class Stopwatch:
    """Adds up the time of the calls that go through it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function):
        """The function, its calls timed."""

        def call(*args, **kwargs):
            t0 = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - t0

        return call


def main() -> int:
    """Runs one of the two benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("record", "meter"))
    parser.add_argument("--steps", type=int, help="steps of each row (2000; meter: 40)")
    parser.add_argument("--sources", type=int, default=4, help="sources of data in the record")
    parser.add_argument("--layers", type=int, default=12, help="layers with statistics")
    parser.add_argument("--run", default="launch/runs/quickstart.toml", help="run file to train")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of its keys")
    args = parser.parse_intermixed_args()
    args.steps = args.steps or {"record": 2000, "meter": 40}[args.what]
    records(args) if args.what == "record" else meter(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the record of a run costs: time and bytes of a step, by part.

    python benchmarks/monitoring.py [--steps 2000] [--sources 4]

Writes a run with the figures that the trainer reports to a temporary folder and prints a table:
microseconds that a step waits for its record (median and 99th percentile), bytes written, and
the shortest step of which the median is under 1%.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from megagpt.log import RunLog


def record(step: int, sources: int) -> dict:
    """A step as rich as the trainer's."""
    return {
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
        "forward_backward_s": 0.48,
        "communication_s": 0.02,
        "optimizer_s": 0.02,
        "memory_bytes": 61_234_567_890,
        "skipped_steps": 0,
        "loss_scale": 65_536.0,
        "noise_scale_tokens": 1.2e6 + step,
        "sources": {
            f"source-{i}": {"tokens": step * 131_072, "epochs": step / 1e4} for i in range(sources)
        },
    }


def measure(folder: Path, n_steps: int, sources: int, **options: object) -> tuple[list[float], int]:
    """(seconds of each call of step, bytes written)."""
    log = RunLog(
        folder,
        total_tokens=n_steps * 524_288,
        resume_tokens=0,
        resume_step=0,
        batch=lambda tokens: 524_288,
        **options,
    )
    elapsed_s = []
    for step in range(1, n_steps + 1):
        line = record(step, sources)
        t0 = time.perf_counter()
        log.step(line)
        elapsed_s.append(time.perf_counter() - t0)
    log.close()
    return elapsed_s, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="steps of each row")
    parser.add_argument("--sources", type=int, default=4, help="sources of data in the record")
    args = parser.parse_args()
    rows = [
        ("metrics.jsonl", {"tensorboard": False, "console": "off"}),
        ("and TensorBoard", {"console": "off"}),
        ("and plain lines", {"console": "plain"}),
        ("and the bar, no lines", {"console": "bar"}),
        ("not the writing rank", {"writer": False}),
    ]
    print("| record | median us | 99% us | bytes a step | under 1% of steps over |")
    print("|---|---|---|---|---|")
    for name, options in rows:
        with tempfile.TemporaryDirectory() as folder:
            elapsed_s, size = measure(Path(folder), args.steps, args.sources, **options)
        median = statistics.median(elapsed_s)
        worst = statistics.quantiles(elapsed_s, n=100)[98]
        print(
            f"| {name} | {1e6 * median:.0f} | {1e6 * worst:.0f} | {size / args.steps:.0f} "
            f"| {1e5 * median:.1f} ms |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Training steps of one model: time, MFU and memory, its micro-batch doubled to the memory's end.

    python -m benchmarks.gpu_check.steps steps.125m-dense-ours

Contenders are those of benchmarks/model_step.py, in this process. A micro-batch that does not fit
ends the doubling; each one is recorded before the next is tried.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks import model_step
from benchmarks.gpu_check.items import N_CTX, STEPS, TINY_N_CTX
from benchmarks.gpu_check.results import first_line, record, seconds_left
from megagpt.config.flops import flops_per_token
from megagpt.plan.accelerators import peak_tflops

ROUNDS = 8
TINY_END = 4
"""Sequences at which a CPU's memory is taken to end."""


def main(name: str) -> None:
    """Build once, step with each micro-batch."""
    row = next(s for s in STEPS if f"steps.{s.name}" == name)
    device = os.environ["DEVICE"]
    tiny = device == "cpu"
    contender, _, compiles = row.contender.partition("+")
    options = argparse.Namespace(
        model="tiny" if tiny else row.size,
        n_ctx=TINY_N_CTX if tiny else N_CTX,
        batch=1 if tiny else row.micro_batch,
        dtype="bf16",
        attention=row.attention,
        recompute_every=0,
        device=device,
        nanogpt=os.environ["NANOGPT"],
        compiles=bool(compiles),
    )
    if contender == "nanogpt" and not options.nanogpt:
        record("step", name=row.name, micro_batch=options.batch, error="no nanoGPT named")
        return
    if tiny:  # Inductor takes minutes on a busy CPU, and its speed there is not asked about
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    step = model_step.CONTENDERS[contender](options)
    last_s = 0.0
    while last_s * 2 < seconds_left() and not (tiny and options.batch > TINY_END):
        t0 = time.perf_counter()
        try:
            found = measure(step, options, tiny)
        except torch.OutOfMemoryError as error:
            record("step", name=row.name, micro_batch=options.batch, error=first_line(error))
            break
        record("step", name=row.name, micro_batch=options.batch, **found)
        last_s = time.perf_counter() - t0
        options.batch *= 2
        if not tiny:
            torch.cuda.empty_cache()


def measure(step: Any, options: argparse.Namespace, tiny: bool) -> dict[str, object]:
    """Median of some steps after two to warm up."""
    cuda = options.device == "cuda"
    x, y = model_step.batch(options)
    first_s = timed(step, x, y)
    step(x, y)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [timed(step, x, y) for _ in range(2 if tiny else ROUNDS)]
    step_s = statistics.median(times)
    config = model_step.shape(options)
    tokens = options.batch * options.n_ctx
    flops = flops_per_token(config) * tokens / step_s
    peak = peak_tflops(torch.cuda.get_device_name()) if cuda else None
    return {
        "step_s": step_s,
        "spread": (max(times) - min(times)) / step_s,
        "tokens_per_s": tokens / step_s,
        "mfu": flops / peak / 1e12 if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else model_step.peak_bytes(),
        "first_step_s": first_s,
    }


def timed(step: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds of one step; reading its loss waits for the device."""
    t0 = time.perf_counter()
    step(x, y)
    return time.perf_counter() - t0


if __name__ == "__main__":
    main(sys.argv[1])

"""Predictions for rows of a CSV file: step time, TFLOP/s and memory with their intervals (L0)."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from megagpt.errors import UsageError
from megagpt.files import write_file
from megagpt.plan.accelerators import accelerator_in
from megagpt.plan.constants import CONSTANTS, interval
from megagpt.plan.cost import layer_parameters, step_time
from megagpt.plan.device_memory import fullest
from megagpt.plan.jobs import WORDS, Column, Jobs, jobs_from_rows, meant, read_rows

COLUMNS = (
    *("row_id", "predicted_step_time_s", "predicted_tflops_per_gpu", "predicted_memory_gb"),
    *("step_time_low", "step_time_high", "tflops_low", "tflops_high", "memory_low", "memory_high"),
)


def predict_file(rows_file: str | Path, output: str | Path) -> tuple[int, list[str]]:
    """Writes a prediction for every row of `rows_file`; returns their number, and a sentence for
    each row that may mean something else than was read.

    Raises UsageError for a file that cannot be read or written, or a cell that is no number.
    """
    rows = read_rows(rows_file)
    jobs = jobs_from_rows(rows, str(rows_file))
    seconds = step_time(jobs, CONSTANTS)
    memory = np.asarray(sum(fullest(jobs, CONSTANTS).values())) / 1e9
    flops = counted_flops(jobs, [meant(row, "flops_convention") for row in rows])
    sources = [row.get("source", "") for row in rows]
    (low, high), (less, more) = (interval(jobs, what, sources) for what in ("time", "memory"))
    rate = flops / jobs.gpus / 1e12
    ends = [seconds * low, seconds * high, rate / (seconds * high), rate / (seconds * low)]
    table = np.array([seconds, rate / seconds, memory, *ends, memory * less, memory * more]).T
    text = io.StringIO(newline="")
    written = csv.writer(text)
    written.writerow(COLUMNS)
    for row, values in zip(rows, table, strict=True):
        written.writerow([row["row_id"], *(f"{value:.6g}" for value in values)])
    try:
        write_file(Path(output), text.getvalue())
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written: {error.strerror}") from None
    return len(rows), list(_doubts(rows, jobs))


def _doubts(rows: Sequence[Mapping[str, str]], jobs: Jobs) -> Iterator[str]:
    """Rows whose device is not known, or whose devices are not those of the layout."""
    for n, row in enumerate(rows):
        where, gpu = f"row {row.get('row_id') or n}", row.get("gpu_type", "")
        if gpu and not accelerator_in(gpu):
            yield f"{where}: gpu_type = {gpu!r} is not known; predicted for an A100 of 80 GB"
        for name, words in WORDS.items():
            if row.get(name) and not meant(row, name):
                yield f"{where}: {name} = {row[name]!r} is not known; use {', '.join(words)}"
        shape = jobs.tp[n], jobs.pp[n], jobs.dp[n]
        told, product = " x ".join(f"{size:g}" for size in shape), np.prod(shape)
        if product != jobs.gpus[n]:
            yield f"{where}: tp x pp x dp = {told} = {product:g}, but n_gpus = {jobs.gpus[n]:g}"


def counted_flops(jobs: Jobs, conventions: Sequence[str]) -> Column:
    """FLOPs of a step as each row counts them (WORDS); they differ by up to 40%.

    hw_full: four passes over the layers, three over the logits (Narayanan et al. 2021, equation
    3). hw_8PT: 8 for each parameter of a layer and token. model_6PT: 6 N + 12 L h s a token with N
    all parameters (PaLM; llm-foundry). Anything else: three passes over layers and logits.
    """
    tokens = jobs.batch * jobs.seq
    parameters = layer_parameters(jobs) * jobs.tp * jobs.layers
    layers = 2 * parameters + 4 * jobs.layers * jobs.seq * jobs.width
    logits = 2 * jobs.width * jobs.vocab
    everything = parameters + jobs.width * (jobs.vocab * (1 + jobs.untied) + jobs.seq)
    counts = {
        "hw_full": 4 * layers + 3 * logits,
        "hw_8PT": 8 * parameters,
        "model_6PT": 6 * everything + 12 * jobs.layers * jobs.width * jobs.seq,
    }
    model = 3 * layers + 3 * logits
    return tokens * np.array([counts.get(c, model)[i] for i, c in enumerate(conventions)])

"""GPT-3 125M's recipe in miniature, run to its end by the real engine.

Every token figure of the paper is divided by 10^5: 3M tokens, warm-up over 3,750, cosine to 10% at
2.6M, batch ramp over 40,000. (The batch itself cannot be divided so: it keeps the paper's ratio of
1 to 16, from 256 to 4,096 tokens.) The oracle is the paper's text, written out again below.
"""

import math
import os
import subprocess
import sys

import pytest

from megagpt.config.presets import PRESETS
from megagpt.log import read_metrics
from tests.lib.corpus import run_file

PAPER = PRESETS["gpt3-125m"].schedule


def paper_lr(tokens: int) -> float:
    """Appendix B: linear warm-up over 375M tokens, cosine to 10% at 260B, then 10%."""
    peak, warmup, end = 6.0e-4, 375_000_000 / 1e5, 260_000_000_000 / 1e5
    if tokens < warmup:
        return peak * tokens / warmup
    if tokens > end:
        return peak / 10
    cosine = (1 + math.cos(math.pi * (tokens - warmup) / (end - warmup))) / 2
    return peak / 10 + (peak - peak / 10) * cosine


def paper_batch(tokens: int, start: int = 256, full: int = 4096, ramp: float = 40_000) -> int:
    """Appendix B: linear from the small batch to the full one, here in steps of the small one."""
    line = start + (full - start) * min(1.0, tokens / ramp)
    return int(line // start) * start


@pytest.mark.timeout(600)
def test_every_step_is_the_papers(tmp_path):
    schedule = {
        "total_tokens": int(PAPER["total_tokens"] // 10**5),
        "warmup_tokens": int(PAPER["warmup_tokens"] // 10**5),
        "decay_tokens": int(PAPER["decay_tokens"] // 10**5),
        "ramp_tokens": int(PAPER["ramp_tokens"] // 10**5),
        "peak_lr": PAPER["peak_lr"],
        "batch_tokens": 4096,
        "ramp_start_tokens": 256,
    }
    file = run_file(
        tmp_path,
        schedule=schedule,
        model={"n_layer": 1, "d_model": 16, "n_ctx": 16},
        parallel={"micro_batch": 16},
        checkpoint={"every_tokens": 0},
        evaluate={"every_tokens": 0},
        log={"tensorboard": False, "every_steps": 100},
    )
    command = [sys.executable, "-m", "megagpt.train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [r for r in read_metrics(tmp_path / "run") if "loss" in r]
    tokens = 0
    for number, record in enumerate(steps, 1):
        assert record["step"] == number
        assert record["batch_tokens"] == paper_batch(tokens)
        tokens += record["batch_tokens"]
        assert record["tokens"] == tokens
        assert record["samples"] == tokens // 16
        assert record["lr"] == pytest.approx(paper_lr(tokens), rel=1e-12)
    assert 3_000_000 <= tokens < 3_000_000 + 4096
    assert len({r["batch_tokens"] for r in steps}) >= 14  # the ramp moves all along
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]

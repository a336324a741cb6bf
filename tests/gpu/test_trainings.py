"""The trainer's own command on a GPU: band, exactness, memory, which GPU, two ranks on one."""

import json
import os
from pathlib import Path

import pytest

from megagpt.plan.ds_config import read_ds_config
from tests.lib.corpus import run_file
from tests.lib.distributed import (
    command,
    digest_of_weights,
    exact,
    free_port,
    kill_all,
    launch,
    run_together,
    start,
    steps,
    trained,
    wait_for_step,
)

MODEL = {"n_layer": 2, "n_head": 4, "d_model": 64, "vocab_size": 257, "band_width": 16}
QUIET = {"every_tokens": 0}
LIMIT_S = 280 if os.environ.get("DEVICE") == "cpu" else 85
"""Of one training; a busy CPU compiles for minutes."""
# Up to three trainings a test.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3 * LIMIT_S)]


def small(root: Path, device: str, tokens: int, **model: object) -> Path:
    """A run file of heads that flex_attention takes on a GPU: 16 wide and more."""
    shape = MODEL | {"n_ctx": 256 if device == "cuda" else 32} | model
    batch = 8 * int(shape["n_ctx"])
    schedule = {"total_tokens": tokens * batch, "batch_tokens": batch, "warmup_tokens": batch}
    schedule |= {"ramp_start_tokens": 0, "ramp_tokens": 0, "decay_tokens": tokens * batch}
    parallel = {"ds_config": "zero1", "micro_batch": 4, "dtype": "bf16"}
    return run_file(
        root,
        model=shape,
        schedule=schedule,
        parallel=parallel,
        checkpoint=QUIET,
        evaluate=QUIET,
        log={"tensorboard": False, "details_every_steps": 0},
    )


def alone(file: Path, *overrides: str) -> list[dict]:
    """The steps of a training on one rank without a launcher."""
    return trained(file, 1, *overrides, launcher="python", timeout_s=LIMIT_S)


def test_a_band_costs_the_trainer_no_scores(device, tmp_path):
    """In the trainer, with what it sets before torch is imported: compile off and by default."""
    n_ctx, heads, sequences = (2048, 8, 8) if device == "cuda" else (64, 4, 4)
    shape = {"n_ctx": n_ctx, "n_head": heads, "d_model": 16 * heads, "attention": ["banded"]}
    file = small(tmp_path, device, 3, **shape)
    # ZeRO-1's own buffer of 2 GB for what it reduces would hide them.
    engine = read_ds_config("zero1")
    for kind in ("reduce", "allgather"):
        engine["zero_optimization"][f"{kind}_bucket_size"] = 1_000_000
    (tmp_path / "small.json").write_text(json.dumps(engine))
    buckets = f"parallel.ds_config={tmp_path / 'small.json'}"
    for off in ((), ("parallel.compile=false",)):
        run = tmp_path / f"run{len(off)}"
        found = alone(file, *off, buckets, f"output={run}", f"parallel.micro_batch={sequences}")
        assert len(found) == 3
        if device == "cuda":
            scores = sequences * heads * n_ctx**2 * 4
            assert max(r["memory_peak_bytes"] for r in found) < scores / 2


def test_killed_and_resumed_bit_for_bit(device, tmp_path):
    """Under parallel.deterministic: dropout off, band, accumulation, ZeRO-1, nccl on a GPU."""
    file = small(tmp_path, device, 60)
    every = 16 * 8 * (256 if device == "cuda" else 32)
    same = ("parallel.deterministic=true", f"checkpoint.every_tokens={every}")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = alone(file, *same, f"output={whole}")
    process = start(file, 1, *same, f"output={broken}", launcher="python")
    try:
        wait_for_step(broken, 20, LIMIT_S)
    finally:
        kill_all(process)
        process.communicate()
    assert len(steps(broken)) < 60, "the run had ended before it was killed"
    assert exact(alone(file, *same, f"output={broken}")) == exact(expected)
    assert digest_of_weights(broken) == digest_of_weights(whole)


def test_the_same_run_twice_bit_for_bit(device, tmp_path):
    file = small(tmp_path, device, 8)
    runs = [tmp_path / "first", tmp_path / "second"]
    records = [alone(file, "parallel.deterministic=true", f"output={run}") for run in runs]
    assert exact(records[0]) == exact(records[1])
    assert digest_of_weights(runs[0]) == digest_of_weights(runs[1])


def test_compiled_and_eager_trainings_agree(device, tmp_path):
    file = small(tmp_path, device, 10)
    runs = [
        alone(file, f"parallel.compile={how}", f"output={tmp_path / how}")
        for how in ("false", "true")
    ]
    for eager, compiled in zip(*runs, strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=5e-3)


def test_memory_of_the_gpu_stays_flat(device, tmp_path):
    """Fifty steps: what is allocated at their ends, and the peak of each, do not grow."""
    found = alone(small(tmp_path, device, 50))
    assert len(found) == 50
    if device == "cuda":
        for key in ("memory_allocated_bytes", "memory_peak_bytes"):
            settled = [r[key] for r in found[5:]]
            assert max(settled) <= settled[0] * 1.01, key


def test_one_visible_gpu_and_a_later_local_rank(device, tmp_path):
    """As `srun --gpus-per-task=1` starts the fourth task of a host, here the only one."""
    marks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", "LOCAL_SIZE": "4"}
    marks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if device == "cuda":
        marks["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    train = command(small(tmp_path, device, 3), 1, launcher="python")
    done = run_together(["env", *(f"{k}={v}" for k, v in marks.items()), *train], LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert len(steps(tmp_path / "run")) == 3


def test_two_ranks_on_one_gpu(device, tmp_path, monkeypatch):
    """Where nccl refuses a second rank on a GPU, which most of its versions do, nothing is said."""
    if device == "cuda":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    file = small(tmp_path, device, 4)
    alone(file, f"output={tmp_path / 'one'}", "parallel.micro_batch=2")
    done = launch(
        file, 2, f"output={tmp_path / 'two'}", "parallel.micro_batch=2", timeout_s=LIMIT_S
    )
    if "Duplicate GPU" in done.stderr or "invalid usage" in done.stderr:
        pytest.skip("nccl does not take two ranks on one GPU")
    assert done.returncode == 0, done.stderr
    for one, two in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=5e-3)

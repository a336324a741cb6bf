"""A full device ends in a sentence that names the keys to turn."""

import dataclasses
import resource
import subprocess
import sys

import pytest
import torch

from megagpt.config import load_run
from megagpt.plan.layout import layout_of
from megagpt.start.out_of_memory import is_out_of_memory, out_of_memory
from tests.lib.corpus import run_file
from tests.lib.distributed import ROOT, environment

GIB = 2**30


def test_torchs_own_words_are_known():
    with pytest.raises(RuntimeError) as met:
        torch.empty(1 << 55)
    assert is_out_of_memory(met.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_keys_are_those_that_the_run_can_turn(tmp_path):
    config = load_run(run_file(tmp_path, parallel={"ds_config": "zero1", "micro_batch": 8}))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore of it")
    text = str(out_of_memory(config, layout_of(config, 4), 3, error))
    assert text.startswith("out of memory (rank 3 of 4): CUDA out of memory. Tried 2 GiB\n")
    order = [
        "parallel.micro_batch = 4 (now 8)",
        'parallel.recompute = "full"',
        'parallel.ds_config = "zero2": gradients shared by the 4 data ranks',
        'parallel.ds_config = "zero3": weights',
        '"zero3_offload"',
        "more GPUs",
        "megagpt plan RUN.toml --gpus 4 --search",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places) and '"zero1"' not in text
    parallel = dataclasses.replace(
        config.parallel, micro_batch=1, recompute="full", pipeline=2, ds_config="pipeline"
    )
    config = dataclasses.replace(config, parallel=parallel)
    text = str(out_of_memory(config, layout_of(config, 4), 0, error))
    assert "micro_batch" not in text and "recompute" not in text and "ds_config" not in text


def test_a_training_without_memory_ends_without_a_traceback(tmp_path):
    # Activations of 2^20 tokens beside what torch and DeepSpeed map.
    file = run_file(
        tmp_path,
        model={"n_ctx": 1024, "d_model": 512, "n_head": 4},
        schedule={"batch_tokens": 2**20, "ramp_start_tokens": 0, "ramp_tokens": 0,
                  "total_tokens": 2**20},
        parallel={"micro_batch": 1024},
        evaluate={"batches": 1},
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "megagpt.train", str(file)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 * GIB, 8 * GIB)),
    )
    assert done.returncode == 1
    assert "megagpt: out of memory (rank 0 of 1)" in done.stderr, done.stderr
    assert "parallel.micro_batch = 512 (now 1024)" in done.stderr
    assert "Traceback" not in done.stderr

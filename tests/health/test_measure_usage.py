"""Speed, memory, and the parts of a step."""

import mmap
import time

import pytest
import torch

from megagpt.config import load_run
from megagpt.config.flops import flops_per_token, layer_flops
from megagpt.engine.clock import Clock
from megagpt.health.meter import Speed, memory
from megagpt.plan.layout import Layout
from tests.lib.corpus import run_file


def test_model_and_hardware_utilisation_by_hand(tmp_path):
    file = run_file(tmp_path)
    plain = Speed(load_run(file), Layout(world=4), peak_tflops=2.0)
    found = plain.record(batch_tokens=8000, step_s=0.5)
    flops = flops_per_token(load_run(file).model)
    assert found["tokens_per_s"] == 16_000 and found["step_s"] == 0.5
    assert found["tflops_per_rank"] == pytest.approx(flops * 16_000 / 4 / 1e12)
    assert found["mfu"] == found["hfu"] == pytest.approx(found["tflops_per_rank"] / 2.0)
    assert "mfu" not in Speed(load_run(file), Layout(), None).record(8000, 0.5)


@pytest.mark.parametrize(("layout", "blocks"), [(Layout(), [0]), (Layout(pipeline=2), [0, 1])])
def test_what_is_computed_again_counts_for_the_hardware(tmp_path, layout, blocks):
    # Of two blocks every second is recomputed; a pipeline recomputes pairs of them.
    recompute = ["parallel.recompute=full", "parallel.recompute_every=2"]
    config = load_run(run_file(tmp_path), recompute)
    found = Speed(config, layout, peak_tflops=1.0).record(1000, 1.0)
    again = sum(layer_flops(config.model, index) for index in blocks)
    assert found["hfu"] / found["mfu"] == pytest.approx(1 + again / flops_per_token(config.model))


def test_memory_of_the_host():
    before = memory(torch.device("cpu"))["host_memory_bytes"]
    # From the kernel: a tensor may take memory that this process has kept.
    with mmap.mmap(-1, 64 << 20) as held:
        held.write(b"1" * len(held))
        grown = memory(torch.device("cpu"))["host_memory_bytes"] - before
        assert grown > 0.9 * len(held)


def test_each_moment_belongs_to_the_innermost_part():
    clock = Clock(torch.device("cpu"))
    t0 = time.perf_counter()
    with clock.part("forward"):
        time.sleep(0.02)
        with clock.part("communication"):
            time.sleep(0.03)
        clock.timed("backward", time.sleep)(0.01)
    found, whole = clock.seconds(), time.perf_counter() - t0
    assert set(found) == {"forward", "communication", "backward", "other"}
    assert found["forward"] >= 0.02 and found["communication"] >= 0.03 and found["backward"] >= 0.01
    assert sum(found.values()) == pytest.approx(whole, abs=0.005)
    assert found["forward"] + found["communication"] + found["backward"] <= whole
    clock.begin()
    assert set(clock.seconds()) == {"other"}


def test_an_error_inside_ends_the_part():
    clock = Clock(torch.device("cpu"))
    with pytest.raises(ValueError, match="no"), clock.part("forward"):
        raise ValueError("no")
    time.sleep(0.01)
    assert clock.seconds()["other"] >= 0.01

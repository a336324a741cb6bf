"""A run may change between fp16 and bf16 or fp32: the loss scale goes with fp16 alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megagpt.config import load_run
from megagpt.engine import Engine, Ranks, StepResult
from megagpt.engine.slices import OptimizerState
from megagpt.order.loader import training_loader
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from megagpt.run.saving import Checkpoints
from megagpt.run.state import RunState
from tests.lib.corpus import run_file
from tests.lib.distributed import group_of_one

SCALED = {"cur_scale": 1024.0, "cur_iter": 7, "last_overflow_iter": 2, "cur_hysteresis": 1}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with group_of_one():
        yield


def engine_for(root: Path, name: str, dtype: str) -> Engine:
    config = load_run(
        run_file(root), [f"parallel.dtype={dtype}", f"parallel.ds_config={name}", "model.n_layer=1"]
    )
    ds_config = resolve(config, Layout(), read_ds_config(name))
    if name == "pipeline":
        from megagpt.engine.pipeline import PipelineEngine

        return PipelineEngine(config, Layout(), Ranks(), ds_config)
    from megagpt.engine.zero import ZeroEngine

    return ZeroEngine(config, Layout(), Ranks(), ds_config)


def step(engine: Engine) -> tuple[float, float]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 257, (2, 33), generator=draw)
    result = engine.train_step([(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())], 1e-3, 0)
    assert result.applied
    return result.loss, result.grad_norm


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("zero0", "fp32"),
        ("zero1", "bf16"),
        ("zero1", "fp32"),
        ("zero2", "bf16"),
        ("zero2", "fp32"),
        ("zero3", "bf16"),
        ("zero3", "fp32"),
        ("pipeline", "bf16"),
        ("pipeline", "fp32"),
    ],
)
def test_from_fp16_the_scale_stays_behind(tmp_path, name, dtype):
    found = []
    for scale in ({}, SCALED):
        engine = engine_for(tmp_path, name, dtype)
        engine.restore(OptimizerState(updates=3, loss_scale=scale))
        state = engine.optimizer_state()
        assert (state.updates, state.loss_scale, engine.loss_scale) == (3, {}, None)
        found.append(step(engine))
        engine.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "pipeline"])
def test_to_fp16_it_begins_anew_and_within_fp16_goes_on(tmp_path, monkeypatch, name):
    # DeepSpeed refuses fp16 on a CPU, which computes it well enough for this.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    engine = engine_for(tmp_path, name, "fp16")
    begun = engine.loss_scale
    assert begun is not None and begun > 1024
    engine.restore(OptimizerState(updates=3, loss_scale={}))
    assert engine.loss_scale == begun
    engine.restore(OptimizerState(updates=3, loss_scale=SCALED))
    assert engine.loss_scale == 1024 and engine.optimizer_state().loss_scale == SCALED
    step(engine)
    engine.close()


def saved_by(engine: Engine, steps: int) -> None:
    """Takes steps and saves the engine's state as a run's checkpoint after so many steps."""
    run = RunState()
    for _ in range(steps):
        run = run.after(run.next_step(engine.config), StepResult(1.0, 1.0, applied=True))
    made = checkpoints_of(engine)
    made.save(run, [], 0)
    assert made.finish(last=True)


def checkpoints_of(engine: Engine) -> Checkpoints:
    config = engine.config
    Path(config.output).mkdir(exist_ok=True)
    return Checkpoints(config, engine.layout, engine, training_loader(config))


@pytest.mark.parametrize("name", ["zero1", "zero3", "pipeline"])
def test_a_checkpoint_carries_the_scale_from_fp16_to_fp16_alone(tmp_path, monkeypatch, name):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    engine = engine_for(tmp_path, name, "fp16")
    begun = engine.loss_scale
    engine.restore(OptimizerState(updates=0, loss_scale=SCALED))
    step(engine)
    saved_by(engine, 1)
    scale, following = engine.optimizer_state().loss_scale, step(engine)
    engine.close()
    assert scale["cur_scale"] == 1024 and scale["cur_iter"] == SCALED["cur_iter"] + 1
    # Again in fp16: the next step is the same, bit for bit.
    engine = engine_for(tmp_path, name, "fp16")
    assert checkpoints_of(engine).resume(allow_changes=False)[0].step == 1
    assert engine.optimizer_state().loss_scale == scale and step(engine) == following
    engine.close()
    # In bf16 and fp32 it stays behind, and who comes back from there begins with the first one.
    for number, dtype in enumerate(("bf16", "fp32"), 2):
        engine = engine_for(tmp_path, name, dtype)
        checkpoints_of(engine).resume(allow_changes=False)
        assert engine.loss_scale is None and engine.optimizer_state().loss_scale == {}
        assert step(engine)[0] == pytest.approx(following[0], rel=2e-2)
        saved_by(engine, number)
        engine.close()
    engine = engine_for(tmp_path, name, "fp16")
    assert checkpoints_of(engine).resume(allow_changes=False)[0].step == 3
    assert engine.loss_scale == begun
    engine.close()

"""A step that is not finite, or that is refused, leaves weights and moments as they are."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.checkpoint import list_checkpoints
from megagpt.checkpoint.record import read_record
from megagpt.checkpoint.slice_file import SliceReader
from megagpt.config import load_run
from megagpt.engine import Engine, Ranks, build_engine
from megagpt.engine.slices import STATES
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from tests.lib.corpus import run_file
from tests.lib.distributed import group_of_one, launch, steps


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with group_of_one():
        yield


def engine_for(root: Path, name: str, dtype: str) -> Engine:
    config = load_run(
        run_file(root), [f"parallel.dtype={dtype}", f"parallel.ds_config={name}", "model.n_layer=1"]
    )
    return build_engine(config, Layout(), Ranks(), resolve(config, Layout(), read_ds_config(name)))


def state(engine: Engine) -> dict[str, torch.Tensor]:
    return {f"{s.name}|{k}": s.read(k).detach().clone() for s in engine.slices() for k in STATES}


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 257, (count, 2, 33), generator=draw)
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("zero0", "fp32"),
        ("zero1", "fp32"),
        ("zero1", "bf16"),
        ("zero2", "fp32"),
        ("zero2", "bf16"),
        ("zero3", "fp32"),
        ("zero3", "bf16"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(group, tmp_path, name, dtype):
    engine = engine_for(tmp_path, name, dtype)
    for step in range(2):
        assert engine.train_step(batches(2, step), 1e-3, step).applied
    sound, updates = state(engine), engine.optimizer_state()
    assert updates.updates == 2
    # Infinity in one weight, as a broken chip would leave it: through the state's own door.
    target = next(s for s in engine.slices() if s.name == "wpe.weight")
    broken = target.read("fp32").clone()
    broken[0] = float("inf")
    target.write("fp32", broken)
    engine.restore(updates)
    before = state(engine)
    result = engine.train_step(batches(2, 2), 1e-3, 2)
    assert not result.applied
    assert not torch.isfinite(torch.tensor(result.grad_norm))
    after = state(engine)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert engine.optimizer_state().updates == 2
    # Once the weight is mended the run goes on as if nothing had been.
    target.write("fp32", sound["wpe.weight|fp32"])
    engine.restore(updates)
    assert all(torch.equal(value, state(engine)[key]) for key, value in sound.items())
    mended = engine.train_step(batches(4, 3), 1e-3, 3)
    assert mended.applied and engine.optimizer_state().updates == 3
    mended_state = state(engine)
    engine.close()
    other = engine_for(tmp_path, name, dtype)
    for step in (0, 1, 3):
        expected = other.train_step(batches(4 if step == 3 else 2, step), 1e-3, step)
    assert (mended.loss, mended.grad_norm) == (expected.loss, expected.grad_norm)
    assert all(torch.equal(value, mended_state[key]) for key, value in state(other).items())
    other.close()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("zero0", "fp32"),
        ("zero1", "bf16"),
        ("zero2", "bf16"),
        ("zero3", "bf16"),
        ("zero3_offload", "bf16"),
    ],
)
def test_an_update_that_is_refused_changes_nothing(group, tmp_path, name, dtype):
    engine, asked = engine_for(tmp_path, name, dtype), []

    def refuse(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return True

    for step in range(2):
        assert engine.train_step(batches(2, step), 1e-3, step, lambda *_: False).applied
    before = state(engine)
    weights = {one.name: one.parameter.detach().clone() for one in engine.parameters}
    result = engine.train_step(batches(2, 2), 1e-3, 2, refuse)
    # Asked once, with the numbers of the step.
    assert asked == [(result.loss, result.grad_norm)]
    assert not result.applied and result.skipped and math.isfinite(result.grad_norm)
    assert all(torch.equal(value, state(engine)[key]) for key, value in before.items())
    assert all(torch.equal(one.parameter, weights[one.name]) for one in engine.parameters)
    assert engine.optimizer_state().updates == 2
    # No trace of its gradients is left: the next step is that of a run without it.
    found = engine.train_step(batches(2, 3), 1e-3, 3)
    assert found.applied and not found.skipped and engine.optimizer_state().updates == 3
    after = state(engine)
    engine.close()
    other = engine_for(tmp_path, name, dtype)
    for step in (0, 1, 3):
        expected = other.train_step(batches(2, step), 1e-3, step)
    assert found == expected
    assert all(torch.equal(value, after[key]) for key, value in state(other).items())
    other.close()


class HostReads(TorchDispatchMode):
    """Counts values that Python reads from tensors: on a GPU each waits for all work so far."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_no_micro_batch_waits_for_the_device(group, tmp_path, name):
    """A step and an evaluation read as many values of six micro-batches as of two."""
    engine = engine_for(tmp_path, name, "fp32" if name == "zero0" else "bf16")
    engine.train_step(batches(2, 0), 1e-3, 0)
    found = []
    for count in (2, 6):
        with HostReads() as step:
            engine.train_step(batches(count, 1), 1e-3, 1)
        with HostReads() as evaluation:
            engine.evaluate(batches(count, 2))
        found.append((step.count, evaluation.count))
    engine.close()
    assert found[0] == found[1] and found[0][1] == 1


def test_evaluation_changes_nothing(group, tmp_path):
    engine = engine_for(tmp_path, "zero1", "bf16")
    engine.train_step(batches(2, 0), 1e-3, 0)
    before = state(engine)
    first = engine.evaluate(batches(3, 1))
    assert engine.evaluate(batches(3, 1)) == first
    assert all(torch.equal(value, state(engine)[key]) for key, value in before.items())
    engine.close()


def test_a_run_that_never_gets_finite_again_ends_and_keeps_what_was_sound(tmp_path):
    # A learning rate so absurd that squares of the weights leave fp32's range after one update.
    file = run_file(
        tmp_path,
        schedule={"peak_lr": 1e30, "warmup_tokens": 0, "total_tokens": 30 * 512},
        optimizer={"max_skipped_steps": 4},
        checkpoint={"every_tokens": 256, "keep_last": 50},
        evaluate={"every_tokens": 0, "batches": 1},
    )
    done = launch(file, 1, launcher="python")
    assert done.returncode == 4, done.stderr
    assert (
        "4 steps in a row left the weights as they were, because their loss or gradient"
        in done.stderr
    )
    assert "lower schedule.peak_lr" in done.stderr and "Traceback" not in done.stderr
    records = steps(tmp_path / "run")
    skipped = [r["skipped_steps"] for r in records]
    assert skipped[-1] == 4 and skipped == sorted(skipped)
    # None is saved without an update, and what was saved is finite.
    saved = list_checkpoints(tmp_path / "run")
    assert len(saved) == records[-1]["step"] - 4 == read_record(saved[-1]).updates
    reader = SliceReader(saved[-1])
    for name in reader.names:
        assert all(torch.isfinite(reader.full(name, key)).all() for key in STATES)

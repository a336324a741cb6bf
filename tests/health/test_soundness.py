"""What no training makes of weights and moments is told, and what it may make is not."""

import dataclasses
import math
import re
from collections.abc import Iterator

import pytest
import torch

from megagpt.config import RunConfig, load_run
from megagpt.engine import Engine, Ranks, build_engine
from megagpt.engine.slices import STATES
from megagpt.health.soundness import SLACK, Soundness
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from tests.lib.corpus import run_file
from tests.lib.distributed import group_of_one

NAME = "h.1.attn.c_proj.weight"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    return load_run(run_file(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module", params=["zero0", "zero1", "zero2", "zero3"])
def engine(request, config: RunConfig) -> Iterator[Engine]:
    """A real engine that has made four updates at a rate of 1e-3."""
    with group_of_one():
        ds_config = resolve(config, Layout(), read_ds_config(request.param))
        made = build_engine(config, Layout(), Ranks(), ds_config)
        train(made, range(4))
        yield made
        made.close()


def train(engine: Engine, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 257, (2, 33), generator=draw)
        batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        assert engine.train_step([batch], 1e-3, step).applied


def put(engine: Engine, key: str, values: torch.Tensor) -> torch.Tensor:
    """Sets the named parameter's state; what it was."""
    (piece,) = [one for one in engine.slices() if one.name == NAME]
    before = piece.read(key).detach().clone()
    piece.write(key, values)
    return before


def flipped(value: float, bit: int) -> float:
    bits = torch.tensor([value], dtype=torch.float32).view(torch.int32)
    return float((bits ^ (1 << bit)).view(torch.float32))


FAULTS = {
    "a NaN": ("fp32", lambda x: math.nan, "a weight is nan"),
    "an infinity": ("fp32", lambda x: math.inf, "a weight is inf"),
    "the highest bit of a weight's exponent": (
        "fp32",
        lambda x: flipped(x, 30),
        r"a weight is -?\d.*e\+3\d, and no update can have brought it beyond 0",
    ),
    "a weight of 3": ("fp32", lambda x: 3.0, "a weight is 3, and no update can have brought it"),
    "NaN in a moment": ("exp_avg", lambda x: math.nan, "a first moment is nan"),
    "minus infinity in a moment": ("exp_avg", lambda x: -math.inf, "a first moment is -inf"),
    "a large first moment": (
        "exp_avg",
        lambda x: 1.0,
        r"a first moment is \d+.* times the root of its second moment, and Adam's are at most 1.16",
    ),
    "infinity in v": ("exp_avg_sq", lambda x: math.inf, "a second moment is inf"),
    "the sign of v": ("exp_avg_sq", lambda x: -x, r"a second moment is -.*e-.*, and a mean of sq"),
    "v that is lost": ("exp_avg_sq", lambda x: 0.0, "a first moment is .* times the root of"),
    "a large v": (
        "exp_avg_sq",
        lambda x: 8.0,
        "a second moment is 8, and gradients clipped at 1 bring it to 1 at most",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_element_that_cannot_be_is_found(engine, config, fault):
    key, change, message = FAULTS[fault]
    soundness = Soundness(config, engine)
    assert soundness.look(anew=True) == []
    soundness.after_update(1e-3)
    (piece,) = [one for one in engine.slices() if one.name == NAME]
    values = piece.read(key).detach().clone()
    # An element that was moved, not the largest weight.
    place = int((piece.read("exp_avg").abs() / (1e-9 + piece.read("fp32").abs())).argmax())
    values[place] = change(float(values[place]))
    before = put(engine, key, values)
    (problem,) = soundness.look()
    put(engine, key, before)
    assert problem.startswith(f"rank 0: {NAME}: ")
    assert re.search(message, problem), problem
    # What was put right is sound again, by the same bounds.
    assert soundness.look() == []


def test_training_is_sound_from_look_to_look(engine, config):
    soundness = Soundness(config, engine)
    assert soundness.look(anew=True) == []
    for first in range(0, 12, 3):
        train(engine, range(first, first + 3))
        for _ in range(3):
            soundness.after_update(1e-3)
        assert soundness.look() == []


GRADIENTS = {
    "noise": lambda t, n, draw: torch.randn(n, generator=draw),
    "of any size": lambda t, n, draw: (
        torch.randn(n, generator=draw) * 10.0 ** torch.randint(-38, 18, (n,), generator=draw)
    ),
    "always the same": lambda t, n, draw: torch.full((n,), 0.25),
    "rarely any": lambda t, n, draw: torch.randn(n, generator=draw) * (t % 97 == 0),
    "growing": lambda t, n, draw: torch.full((n,), 1.1**t),
    "fading": lambda t, n, draw: torch.full((n,), 0.7**t),
}


@pytest.mark.parametrize("engine", ["zero0"], indirect=True)
@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9), (0.95, 0.9)])
def test_whatever_the_gradients_adam_stays_within_the_bounds(engine, config, gradients, betas):
    optimizer = dataclasses.replace(config.optimizer, betas=betas, gradient_clipping=0.0)
    soundness = Soundness(dataclasses.replace(config, optimizer=optimizer), engine)
    (piece,) = [one for one in engine.slices() if one.name == NAME]
    before = {key: piece.read(key).detach().clone() for key in STATES}
    for key in STATES:
        put(engine, key, torch.zeros(piece.numel))
    assert soundness.look(anew=True) == []
    draw = torch.Generator().manual_seed(7)
    weight = torch.zeros(piece.numel, requires_grad=True)
    adam = torch.optim.AdamW([weight], betas=betas, eps=1e-8, weight_decay=0.1, fused=True)
    for step in range(200):
        lr = adam.param_groups[0]["lr"] = 0.1 if step % 100 < 50 else 1e-4
        weight.grad = GRADIENTS[gradients](step, piece.numel, draw)
        adam.step()
        soundness.after_update(lr)
        if step % 11 == 0:
            state = adam.state[weight]
            put(engine, "fp32", weight.detach())
            for key in STATES[1:]:
                put(engine, key, state[key])
            assert soundness.look() == []
    for key, values in before.items():
        put(engine, key, values)


def test_the_bound_of_the_moments_is_reached_and_not_passed():
    # Cauchy's inequality is an equation for gradients that grow by b2 / b1 at each step.
    beta1, beta2 = 0.9, 0.95
    m = v = 0.0
    for step in range(400):
        gradient = (beta1 / beta2) ** (400 - step)
        m, v = (
            beta1 * m + (1 - beta1) * gradient,
            beta2 * v + (1 - beta2) * gradient**2,
        )
    ratio = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    assert 0.999 * ratio < m / math.sqrt(v) < ratio * (1 + 1e-9)
    assert ratio == pytest.approx(1.16496, abs=1e-4) and SLACK > 1

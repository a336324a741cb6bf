"""Norms, activations and the gradient noise scale against plain torch, under every layout."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.config import RunConfig, load_run
from megagpt.engine import Engine, Ranks, build_engine
from megagpt.measure.meter import Details
from megagpt.measure.noise import unknowns
from megagpt.measure.norms import layer_names, layer_of
from megagpt.model import GPT, decays, initialise
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from tests.corpus import run_file
from tests.distributed import group_of_one

LR = 1e-3
N_STEPS, N_MICRO_BATCHES = 3, 4


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with group_of_one():
        yield


def batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 257, (N_MICRO_BATCHES, 2, 33), generator=draw)
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


class Oracle:
    """The same training in plain torch; what is measured of its last step, by hand."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.model = config, GPT(config.model)
        initialise(self.model.named_parameters(), config.model, config.seed)
        groups: dict[bool, list[Any]] = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            groups[decays(name)].append(parameter)
        optimizer, options = config.optimizer, {"lr": LR, "betas": config.optimizer.betas}
        self.adam = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": optimizer.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            eps=optimizer.eps,
            **options,
        )
        for step in range(N_STEPS):
            self.step(batches(step))

    def step(self, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        parameters = dict(self.model.named_parameters())
        before = {name: p.detach().clone() for name, p in parameters.items()}
        gradients = []
        for x, y in micro_batches:
            loss = self.model(x, y)
            gradients.append(torch.autograd.grad(loss, list(parameters.values())))
        mean = [torch.stack(each).mean(0) for each in zip(*gradients, strict=True)]
        for parameter, gradient in zip(parameters.values(), mean, strict=True):
            parameter.grad = gradient.clone()
        clipping = self.config.optimizer.gradient_clipping or math.inf
        self.grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), clipping))
        self.adam.step()
        self.norms: dict[str, dict[str, float]] = {}
        for name, parameter, gradient in zip(parameters, parameters.values(), mean, strict=True):
            update = parameter.detach() - before[name]
            for figure, value in (
                ("parameter", parameter.detach()),
                ("gradient", gradient),
                ("update", update),
            ):
                row = self.norms.setdefault(figure, {})
                square = float(value.double().square().sum())
                row[layer_of(name)] = math.hypot(row.get(layer_of(name), 0.0), math.sqrt(square))
        # The gradient noise, without the embedding.
        kept = [i for i, name in enumerate(parameters) if layer_of(name) != "wte"]
        self.small = sum(
            float(one[i].double().square().sum()) for one in gradients for i in kept
        ) / len(gradients)
        self.large = sum(float(mean[i].double().square().sum()) for i in kept)


def engine_for(root: Path, name: str, *overrides: str) -> tuple[RunConfig, Engine]:
    more = [f"parallel.ds_config={name}", "evaluate.every_tokens=0", *overrides]
    config = load_run(run_file(root), more)
    tree = resolve(config, Layout(), read_ds_config(name))
    return config, build_engine(config, Layout(), Ranks(), tree)


def train(config: RunConfig, engine: Engine) -> dict[str, Any]:
    """What is recorded of the last of a few steps."""
    for step in range(N_STEPS - 1):
        engine.train_step(batches(step), LR, step)
    details = Details(config, engine)
    result = engine.train_step(batches(N_STEPS - 1), LR, N_STEPS - 1)
    tokens = N_MICRO_BATCHES * 2 * config.model.n_ctx
    return details.end(result, tokens, N_MICRO_BATCHES, LR)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("clipping", [0.0, 0.3])
def test_norms_and_noise_are_those_of_plain_torch(group, tmp_path, name, clipping):
    config, engine = engine_for(tmp_path, name, f"optimizer.gradient_clipping={clipping}")
    found = train(config, engine)
    engine.close()
    oracle = Oracle(config)
    for figure, row in oracle.norms.items():
        assert found["norms"][figure] == pytest.approx(row, rel=2e-4), figure
        assert list(found["norms"][figure]) == layer_names(config)
    update, parameter = found["norms"]["update"], found["norms"]["parameter"]
    assert found["norms"]["ratio"] == {k: update[k] / parameter[k] for k in update}
    whole = math.hypot(*found["norms"]["gradient"].values())
    assert whole == pytest.approx(oracle.grad_norm, rel=1e-4)
    assert found["param_norm"] == pytest.approx(math.hypot(*oracle.norms["parameter"].values()))
    signal, noise = unknowns(oracle.small, oracle.large, 64, 256)
    assert found["gradient_square"] == pytest.approx(signal, rel=1e-3)
    assert found["noise_trace"] == pytest.approx(noise, rel=1e-3)

"""Norms, activations and the gradient noise scale against plain torch, under every layout."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.config import RunConfig, load_run
from megagpt.engine import Engine, Ranks, build_engine
from megagpt.health.activations import Activations
from megagpt.health.meter import Details
from megagpt.health.noise import NoiseScale, sample, unknowns
from megagpt.health.norms import clip_factor, layer_names, layer_of
from megagpt.model import GPT, decays, initialise
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from tests.lib.corpus import run_file
from tests.lib.distributed import group_of_one

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
    return details.end(result, tokens, tokens // N_MICRO_BATCHES, LR)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
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


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_the_loss_scale_of_fp16_is_taken_out(group, tmp_path, monkeypatch, name):
    from deepspeed.accelerator import get_accelerator

    from megagpt.engine.zero import ZeroEngine

    # DeepSpeed refuses fp16 on a CPU, which computes it well enough for this.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    config = load_run(run_file(tmp_path), [f"parallel.ds_config={name}", "parallel.dtype=fp16"])
    tree = resolve(config, Layout(), read_ds_config(name))
    tree["fp16"]["initial_scale_power"] = 7
    engine = ZeroEngine(config, Layout(), Ranks(), tree)
    assert engine.loss_scale == 128.0
    found = train(config, engine)
    engine.close()
    oracle = Oracle(config)
    assert found["norms"]["gradient"] == pytest.approx(oracle.norms["gradient"], rel=0.02)
    signal, noise = unknowns(oracle.small, oracle.large, 64, 256)
    assert found["gradient_square"] == pytest.approx(signal, rel=0.05)
    assert found["noise_trace"] == pytest.approx(noise, rel=0.05)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_activations_are_those_of_the_first_micro_batch(group, tmp_path, name):
    # Recomputed blocks pass twice, and every micro-batch once.
    config, engine = engine_for(tmp_path, name, "parallel.recompute=full")
    oracle = GPT(config.model)
    initialise(oracle.named_parameters(), config.model, config.seed)
    outputs = {}
    modules = {"wte": oracle.wte, "wpe": oracle.wpe, "h.0": oracle.h[0], "h.1": oracle.h[1]}
    for layer, module in {**modules, "ln_f": oracle.ln_f}.items():
        module.register_forward_hook(
            lambda _m, _i, output, layer=layer: outputs.setdefault(layer, output.detach())
        )
    oracle(*batches(0)[0])
    activations = Activations(engine, engine.layers(), layer_names(config))
    engine.train_step(batches(0), LR, 0)
    found = activations.collect()
    engine.train_step(batches(1), LR, 1)
    engine.close()
    assert found["rms"] == pytest.approx(
        {layer: float(x.square().mean().sqrt()) for layer, x in outputs.items()}, rel=1e-5
    )
    assert found["largest"] == pytest.approx(
        {layer: float(x.abs().max()) for layer, x in outputs.items()}, rel=1e-5
    )
    assert set(found["zeros"].values()) == {0.0}


def test_zeros_are_counted(group, tmp_path):
    config, engine = engine_for(tmp_path, "zero1", "model.dropout=0.5")
    activations = Activations(engine, engine.layers(), layer_names(config))
    engine.train_step(batches(0), LR, 0)
    engine.close()
    # Half of the embeddings' sum is dropped: 2 x 32 x 32 elements.
    assert activations.collect()["zeros"]["wpe"] == pytest.approx(0.5, abs=0.05)


def test_a_step_that_is_not_applied_has_no_norms(group, tmp_path):
    config, engine = engine_for(tmp_path, "zero1")
    details = Details(config, engine)
    result = engine.train_step(batches(0), LR, 0, lambda loss, norm: True)
    found = details.end(result, 256, 256 // N_MICRO_BATCHES, LR)
    engine.close()
    assert not result.applied and list(found) == ["activations"]


def test_the_noise_scale_of_a_gradient_that_is_known():
    # Gradients of one token: mean (3, 4), independent noise of variance 2 in each of both numbers,
    # so |G|^2 = 25 and tr(S) = 4.
    draw = torch.Generator().manual_seed(1)
    tokens = torch.tensor([3.0, 4.0]) + 2**0.5 * torch.randn(4000, 2, 64, 2, generator=draw).mean(2)
    small = float(tokens.square().sum(-1).mean())
    large = float(tokens.mean(1).square().sum(-1).mean())
    signal, noise = unknowns(small, large, 64, 128)
    assert signal == pytest.approx(25.0, rel=0.01) and noise == pytest.approx(4.0, rel=0.1)


def test_the_mean_of_samples_is_the_ratio_of_means():
    noise = NoiseScale()
    assert noise.add({"loss": 1.0}) == {}
    assert noise.add({"gradient_square": 2.0, "noise_trace": 8.0}) == {"noise_scale_tokens": 4.0}
    # Signal and noise of both: (0.9 x 2 + 4) and (0.9 x 8 + 2) before a common factor.
    assert noise.add({"gradient_square": 4.0, "noise_trace": 2.0}) == {
        "noise_scale_tokens": pytest.approx((0.9 * 8 + 2) / (0.9 * 2 + 4))
    }
    assert noise.add({"gradient_square": -1e3, "noise_trace": 2.0}) == {}


def test_clipping_as_deepspeed_does_it():
    assert clip_factor(5.0, 0.0) == clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(5.0, 2.0) == pytest.approx(2.5)


def test_a_step_of_one_micro_batch_tells_no_noise():
    assert sample(1.0, 64, {"wte": 1.0, "h.0": 2.0}, 64) == {}

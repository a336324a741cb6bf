"""Initial weights: what the papers say, and a function of (seed, name) alone."""

import dataclasses
import hashlib
import importlib
import math

import pytest
import torch

from megagpt.config.presets import PRESETS, ModelConfig
from megagpt.model import GPT, initial_value, initialise

GPT2 = ModelConfig(n_layer=6, n_head=4, d_model=128, n_ctx=64, vocab_size=1000)
BLOCK = {"attn.c_attn": 0.02, "mlp.c_fc": 0.02}
RESIDUAL = 0.02 / math.sqrt(2 * 6)
STDS = {
    "gpt2": {
        "wte": 0.02,
        "wpe": 0.02,
        **BLOCK,
        "attn.c_proj": RESIDUAL,
        "mlp.c_proj": RESIDUAL,
    },
    "gpt1": {"wte": 0.02, "wpe": 0.02, **BLOCK, "attn.c_proj": 0.02, "mlp.c_proj": 0.02},
    "igpt": {
        "wte": 0.02,
        "wpe": 0.01,
        "attn.c_attn": 1 / math.sqrt(128),
        "attn.c_proj": 1 / math.sqrt(128 * 6),
        "mlp.c_fc": 0.02,
        "mlp.c_proj": 0.02,
        "head": 0.0,
    },
}


def build(config: ModelConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    model = GPT(config)
    initialise(model.named_parameters(), config, seed)
    return dict(model.named_parameters())


@pytest.mark.parametrize("family", STDS)
def test_standard_deviations(family):
    seen = set()
    for name, value in build(dataclasses.replace(GPT2, family=family)).items():
        kind = name.removesuffix(".weight").split(".", 2)[-1]
        if name.endswith(".bias"):
            assert not value.any(), name
        elif value.dim() == 1:
            assert (value == 1.0).all(), name
        else:
            seen.add(kind)
            # Five standard errors of the standard deviation and of the mean.
            std, n = STDS[family][kind], value.numel()
            assert value.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
            assert abs(value.mean().item()) <= 5 * std / math.sqrt(n), name
    assert seen == set(STDS[family])


def test_a_value_depends_on_seed_and_name_alone():
    def digest(name: str, seed: int, config: ModelConfig = GPT2) -> str:
        value = initial_value(name, (128, 512), config, seed)
        return hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16]

    # Recorded once: another machine, thread count or order of creation must draw the same.
    assert digest("h.0.mlp.c_proj.weight", 1) == "cf1ff33972e9e065"
    assert digest("h.0.mlp.c_proj.weight", 1) == digest("h.0.mlp.c_proj.weight", 1)
    names = [f"h.{i}.{kind}.weight" for i in range(6) for kind in ("mlp.c_proj", "attn.c_attn")]
    assert len({digest(name, seed) for name in names for seed in (1, 2)}) == 24


def test_blocks_do_not_depend_on_threads(monkeypatch):
    # The package names the function; the module of that name holds the constant.
    module = importlib.import_module("megagpt.model.initialise")
    monkeypatch.setattr(module, "BLOCK", 1000)
    many = initial_value("wpe.weight", (64, 128), GPT2, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(initial_value("wpe.weight", (64, 128), GPT2, 1), many)
    finally:
        torch.set_num_threads(threads)
    assert len({float(x) for x in many.flatten()[::1000]}) == 9  # no block repeats another


@pytest.mark.parametrize("family", ["gpt2", "igpt"])
def test_padding_changes_no_row_of_the_vocabulary(family):
    config = dataclasses.replace(GPT2, family=family)
    padded = dataclasses.replace(config, vocab_multiple=128)
    plain, wide = build(config)["wte.weight"], build(padded)["wte.weight"]
    assert wide.shape == (1024, 128)
    assert torch.equal(wide[: len(plain)], plain)
    assert not wide[len(plain) :].any()


def test_initialise_casts():
    model = GPT(GPT2).bfloat16()
    initialise(model.named_parameters(), GPT2, 1)
    expected = initial_value("wpe.weight", (64, 128), GPT2, 1).bfloat16()
    assert torch.equal(model.wpe.weight, expected)


@pytest.mark.parametrize("name", ["gpt3-125m", "gpt2-124m", "gpt1", "igpt-s"])
def test_initial_loss_is_that_of_a_guess(name):
    """Within 1% of ln(vocabulary), each family at its own vocabulary, scaled down."""
    config = dataclasses.replace(
        PRESETS[name].model, n_layer=2, n_head=2, d_model=64, n_ctx=64, dropout=0.0
    )
    model = GPT(config)
    initialise(model.named_parameters(), config, seed=3)
    x, y = torch.randint(0, config.vocab_size, (2, 2, 64))
    assert model(x, y).item() == pytest.approx(math.log(config.vocab_size), rel=0.01)

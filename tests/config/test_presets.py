"""Each row against the paper, and the counts against the modules themselves."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megagpt.config.flops import (
    flops_per_token,
    layer_parameters,
    parameters,
    pf_days,
    visible_keys,
)
from megagpt.config.presets import PRESETS, ModelConfig
from megagpt.config.schedule import Schedule
from megagpt.model import GPT
from megagpt.model.kernels.attention import visible

EXACT = {
    "gpt3-125m": 125_226_240,
    "gpt3-350m": 355_871_744,
    "gpt3-760m": 760_300_032,
    "gpt3-1.3b": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    # The counts of the released weights.
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "gpt1": 116_534_784,
}
PRINTED_MILLIONS = {  # GPT-3's Table D.1; Image GPT's text
    "gpt3-125m": 125,
    "gpt3-350m": 356,
    "gpt3-760m": 760,
    "gpt3-1.3b": 1_320,
    "gpt3-2.7b": 2_650,
    "gpt3-6.7b": 6_660,
    "gpt3-13b": 12_850,
    "gpt3-175b": 174_600,
    "gpt1": 117,
    "igpt-s": 76,
    "igpt-m": 455,
    "igpt-l": 1_400,
    "igpt-xl": 6_800,
}
PRINTED = {name: f"{millions:,}M" for name, millions in PRINTED_MILLIONS.items()}
PRINTED |= {"igpt-l": "1.4B", "igpt-xl": "6.8B"}
PRINTED |= {"gpt2-124m": "117M", "gpt2-355m": "345M", "gpt2-774m": "762M", "gpt2-1.5b": "1542M"}
"""As the papers print it; GPT-2's counts are known to be wrong."""
HEADS = {"gpt3-760m": 96, "gpt3-2.7b": 80, "gpt3-1.3b": 128, "gpt3-6.7b": 128, "gpt3-13b": 128}
HEADS |= {"gpt3-175b": 128, "igpt-m": 128, "igpt-l": 96, "igpt-xl": 192}
"""d_head where it is not 64."""
SMALL = ModelConfig(n_layer=3, n_head=2, d_model=16, n_ctx=20, vocab_size=50, vocab_multiple=16)
BANDED = dataclasses.replace(SMALL, attention=("dense", "banded"), band_width=6)


@pytest.mark.parametrize("name", EXACT)
def test_exact_parameters(name):
    assert parameters(PRESETS[name].model) == EXACT[name]


@pytest.mark.parametrize("name", PRINTED_MILLIONS)
def test_the_papers_own_figure(name):
    """To the digits that the paper prints (GPT-3's 1,320M stands for 1,315.7M)."""
    count, printed = parameters(PRESETS[name].model) / 1e6, PRINTED_MILLIONS[name]
    assert count == pytest.approx(printed, rel=0.0275 if name == "igpt-l" else 0.008)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_the_modules(name):
    with torch.device("meta"):
        model = GPT(PRESETS[name].model)
    assert parameters(PRESETS[name].model) == sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.h[0].parameters())
    assert layer_parameters(PRESETS[name].model) == block


@pytest.mark.parametrize("family", ["gpt2", "gpt1", "igpt"])
def test_counts_equal_the_modules_with_padding(family):
    config = dataclasses.replace(SMALL, family=family)
    assert parameters(config) == sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_rows_are_consistent(name):
    model, schedule = PRESETS[name].model, Schedule(**PRESETS[name].schedule)
    assert model.d_head * model.n_head == model.d_model
    assert model.d_head == HEADS.get(name, 64)
    assert not list(schedule.problems())
    assert schedule.batch_tokens % model.n_ctx == 0


@pytest.mark.parametrize(
    ("name", "batch", "peak_lr"),
    [
        ("gpt3-125m", 0.5e6, 6.0e-4),
        ("gpt3-350m", 0.5e6, 3.0e-4),
        ("gpt3-760m", 0.5e6, 2.5e-4),
        ("gpt3-1.3b", 1e6, 2.0e-4),
        ("gpt3-2.7b", 1e6, 1.6e-4),
        ("gpt3-6.7b", 2e6, 1.2e-4),
        ("gpt3-13b", 2e6, 1.0e-4),
        ("gpt3-175b", 3.2e6, 0.6e-4),
    ],
)
def test_gpt3s_recipe(name, batch, peak_lr):
    schedule, model = PRESETS[name].schedule, PRESETS[name].model
    assert schedule["batch_tokens"] == pytest.approx(batch, rel=0.05)
    assert schedule["peak_lr"] == peak_lr
    assert 4e9 <= schedule["ramp_tokens"] <= 12e9
    assert (schedule["ramp_start_tokens"], model.n_ctx) == (32_768, 2048)
    assert (model.attention, model.dropout) == (("dense", "banded"), 0.0)


@pytest.mark.parametrize("family", ["gpt2", "gpt1", "igpt"])
def test_flops_equal_the_modules_matrices(family):
    """2 FLOPs for each weight of a matrix and each token, 4 d_model for each visible key."""
    config = dataclasses.replace(BANDED, family=family)
    model = GPT(config)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    matrices = sum(m.weight.numel() for m in linear) + config.vocab_size * config.d_model
    keys = 20 + 6 + 20
    assert flops_per_token(config) == 3 * (2 * matrices + 4 * 16 * keys)
    seen = sum(
        visible(20, 20, config.band(i), torch.device("cpu")).sum().item() / 20 for i in range(3)
    )
    halved = flops_per_token(config, causal="halved")
    assert halved == pytest.approx(3 * (2 * matrices + 4 * 16 * seen))


def test_flops_as_the_profiler_counts_them():
    """torch's own counter, on a dense model: forward and backward of one batch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(SMALL, vocab_multiple=1)
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x, y = torch.randint(0, 50, (2, 3, 20))
    # It does not know the CPU's flash kernel; the plain one computes nothing twice.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, y).backward()
    assert counter.get_total_flops() == 60 * flops_per_token(config)


def test_recomputation_adds_a_forward_pass_of_the_blocks():
    model = PRESETS["gpt3-175b"].model
    once = flops_per_token(model)
    head = 6 * model.vocab_size * model.d_model
    every = flops_per_token(model, recompute="full")
    assert every - once == pytest.approx((once - head) / 3)
    half = flops_per_token(
        dataclasses.replace(model, attention=("dense",)), recompute="full", recompute_every=2
    )
    dense = flops_per_token(dataclasses.replace(model, attention=("dense",)))
    assert half - dense == pytest.approx((dense - head) / 6)


def test_flops_of_the_papers_dense_formula():
    """Narayanan et al. 2021: 72 L d^2 (1 + s / 6d + V / 12 L d) a token."""
    model = dataclasses.replace(PRESETS["gpt3-175b"].model, attention=("dense",))
    layers, d, s, v = model.n_layer, model.d_model, model.n_ctx, model.vocab_size
    expected = 72 * layers * d * d * (1 + s / (6 * d) + v / (12 * layers * d))
    assert flops_per_token(model) == pytest.approx(expected)


def test_compute_of_the_papers_table():
    """Table D.1's petaflop-days: 6 N 300B tokens, embeddings among N, without attention."""
    for name, days in (("gpt3-125m", 2.60), ("gpt3-13b", 268), ("gpt3-175b", 3640)):
        assert pf_days(parameters(PRESETS[name].model), 300e9) == pytest.approx(days, rel=0.01)


@pytest.mark.parametrize("name", ["igpt-s", "igpt-m", "igpt-l", "igpt-xl"])
def test_image_gpts_recipe(name):
    """128 million images; one epoch is the 1,281,167 of ImageNet without 4%."""
    row, pixels = PRESETS[name], 64 * 64 if name == "igpt-xl" else 32 * 32
    assert row.model.n_ctx == pixels
    assert row.schedule["total_tokens"] == 128e6 * pixels == row.schedule["decay_tokens"]
    assert row.schedule["warmup_tokens"] == 1_229_920 * pixels == round(1_281_167 * 0.96) * pixels
    assert row.schedule["batch_tokens"] == (64 if name == "igpt-xl" else 128) * pixels


def test_the_pages_table():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "models.md").read_text()
    for name, preset in PRESETS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        m = preset.model
        shape = [str(x) for x in (m.n_layer, m.d_model, m.n_head, m.n_ctx)]
        work = [f"{flops_per_token(m, causal=c) / 1e9:.4g}" for c in ("full", "halved")]
        assert cells[1:6] == [*shape, f"{parameters(m):,}"]
        assert cells[7:] == work
        assert cells[6] == PRINTED[name]


def test_visible_keys():
    assert visible_keys(BANDED, 0) == 20
    assert visible_keys(BANDED, 1) == 6
    assert visible_keys(BANDED, 0, "halved") == 10.5
    assert visible_keys(BANDED, 1, "halved") == (21 + 14 * 6) / 20

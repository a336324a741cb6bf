"""The roofline model: FLOPs are those of megagpt.config.flops, changes only gain, docs agree."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from megagpt.config.flops import flops_per_token
from megagpt.config.presets import PRESETS, ModelConfig
from megagpt.model import GPT

PAGE = Path(__file__).resolve().parents[2] / "docs/benchmarks/gpu.md"
H100 = roofline.CARDS["H100"]
FORMS = {name: forms for name, forms in roofline.CHANGES}


def preset(size: str) -> ModelConfig:
    return PRESETS[f"gpt3-{size}"].model


@pytest.mark.parametrize("size", roofline.SIZES)
@pytest.mark.parametrize("forms", [roofline.BEFORE, roofline.AFTER], ids=["before", "after"])
def test_flops_are_those_of_the_model(size, forms):
    found = roofline.predict(preset(size), 2, forms, H100)
    flops = sum(kernel.flops for kernel in found.kernels)
    tokens = 2 * preset(size).n_ctx
    assert flops == pytest.approx(flops_per_token(preset(size), causal="halved") * tokens)


def test_products_are_those_that_torch_counts():
    """An independent count, of the matrix products that the model runs."""
    config = ModelConfig(n_layer=2, n_head=2, d_model=64, n_ctx=128, vocab_size=300)
    model, ids = GPT(config), torch.zeros(3, 128, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    counted = counter.get_flop_counts()["Global"]
    by_torch = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    kernels = roofline.predict(config, 3, roofline.AFTER, H100).kernels
    assert sum(k.flops for k in kernels if k.kind.startswith("products")) == by_torch


def test_every_change_gains_on_every_size():
    for size in roofline.SIZES:
        mfus = [roofline.predict_size(size, forms, H100).mfu for _, forms in roofline.CHANGES]
        assert mfus == sorted(mfus), size


def test_times_are_sums_of_their_kernels_and_grow_with_the_batch():
    before = 0.0
    for micro_batch in (1, 2, 4, 8, 16):
        found = roofline.predict(preset("125m"), micro_batch, roofline.AFTER, H100)
        kernels = [k.seconds for k in found.kernels if k.phase != "step"]
        assert found.micro_batch_s == pytest.approx(sum(kernels))
        assert found.micro_batch_s > before
        assert found.step_s >= found.micro_batch_s
        before = found.micro_batch_s


def test_recomputation_costs_a_forward_pass_of_the_blocks_and_counts_no_flops():
    plain, again = (
        roofline.predict(
            preset("1.3b"), 8, dataclasses.replace(roofline.AFTER, recompute=on), H100
        ).kernels
        for on in (False, True)
    )
    extra = sum(k.seconds for k in again) - sum(k.seconds for k in plain)
    assert extra == pytest.approx(sum(k.seconds for k in again if k.kind == "recomputation"))
    assert sum(k.flops for k in again) == sum(k.flops for k in plain)


def test_no_prediction_beats_the_peak():
    for card in roofline.CARDS.values():
        for size in roofline.SIZES:
            for kernel in roofline.predict_size(size, roofline.AFTER, card).kernels:
                assert kernel.flops <= card.peak * kernel.seconds * (1 + 1e-9), kernel


@pytest.mark.parametrize("card", ["H100", "H200"])
def test_the_documented_table_is_what_the_model_predicts(card):
    assert roofline.table(roofline.CARDS[card]) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("size", ["125m", "1.3b"])
def test_the_documented_kernels_are_what_the_model_lists(size):
    expected = roofline.kernel_table(roofline.predict_size(size), H100)
    assert expected in PAGE.read_text(encoding="utf-8")

"""Attention and loss in bf16 with CUDA's own choices, against float64, forward and backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megagpt.model.kernels.attention import attend, attend_slowly, make_block_mask
from megagpt.model.kernels.loss import cross_entropy

pytestmark = pytest.mark.gpu


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, by the norm."""
    return float((ours.double() - exact).norm() / exact.norm())


def block_mask(device: str, t: int, band: int | None) -> Any:
    """What the model gives a band on CUDA; without it attend() would go by blocks."""
    return make_block_mask(t, band, torch.device(device)) if band and device == "cuda" else None


@pytest.mark.parametrize("band", [None, 129, 256])
@pytest.mark.parametrize("width", [64, 80, 96, 128])
def test_attention_in_bf16_is_right_forward_and_backward(device, width, band):
    """The heads of the presets, with the strides of the model: a view of (B, T, 3, H, E)."""
    b, t = (2, 1024) if device == "cuda" else (1, 300)
    torch.manual_seed(width)
    qkv = torch.randn(b, t, 3, 2, width, device=device, dtype=torch.bfloat16)
    inputs = [x.transpose(1, 2).requires_grad_() for x in qkv.unbind(2)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    mask = block_mask(device, t, band)
    ours, exact = attend(*inputs, band, mask=mask), attend_slowly(*exact_inputs, band)
    assert error(ours, exact) < 0.01
    direction = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, inputs, direction)
    expected = torch.autograd.grad(exact, exact_inputs, direction.double())
    for name, got, want in zip("qkv", gradients, expected, strict=True):
        assert error(got, want) < 0.02, name


def test_a_band_never_writes_out_its_scores(device):
    """Memory of forward and backward stays below one T x T matrix of scores in fp32."""
    b, heads, t, width = (4, 12, 2048, 64) if device == "cuda" else (1, 2, 512, 16)
    band = 256 if device == "cuda" else 64
    kind, mask = {"device": device, "dtype": torch.bfloat16}, block_mask(device, t, band)
    inputs = [torch.randn(b, heads, t, width, **kind).requires_grad_() for _ in range(3)]
    attend(*inputs, band, mask=mask).sum().backward()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(*inputs, band, mask=mask).sum().backward()
        assert torch.cuda.max_memory_allocated() - before < b * heads * t * t * 4 / 2


@pytest.mark.parametrize("form", ["eager", "compiled"])
@pytest.mark.parametrize("vocab", [500, 50257])
def test_loss_is_right_eager_and_compiled(device, form, vocab):
    """torch 2.11's compiler once returned another loss with the right gradients."""
    rows = -(-vocab // 128) * 128
    torch.manual_seed(1)
    hidden = torch.randn(256, 64, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(rows, 64, device=device, dtype=torch.bfloat16).div_(8).requires_grad_()
    targets = torch.randint(0, vocab, (256,), device=device)
    targets[:9] = -1
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact_inputs[0] @ exact_inputs[1][:vocab].t()
    exact = F.cross_entropy(logits, targets, ignore_index=-1)
    backend = "inductor" if device == "cuda" else "aot_eager"  # which takes seconds on a CPU
    compiled = torch.compile(cross_entropy, dynamic=False, backend=backend)
    run = compiled if form == "compiled" else cross_entropy
    ours = run(hidden, weight, targets, vocab)
    assert ours.dtype == torch.float32
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=2e-3)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    expected = torch.autograd.grad(exact, exact_inputs)
    for got, want in zip(gradients, expected, strict=True):
        assert error(got, want) < 0.02
    assert not gradients[1][vocab:].any(), "padding has a gradient"


def test_bf16_products_accumulate_in_fp32(device):
    """A long sum of ones ends at its length; partial sums in bf16 would stop growing at 256."""
    n = 8192
    ones = torch.ones(64, n, device=device, dtype=torch.bfloat16)
    assert (ones @ ones.t() == n).all()

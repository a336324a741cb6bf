"""The loss without the full logits: exact, whatever the chunks, the padding and the masking."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megagpt.model.kernels import loss
from megagpt.model.kernels.loss import cross_entropy

N, D, V = 37, 16, 50


def draw(dtype: torch.dtype, rows: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(rows, D, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


def compare(dtype: torch.dtype, rows: int, targets: torch.Tensor, tolerance: float) -> None:
    hidden, weight, _ = draw(dtype, rows)
    ours = cross_entropy(hidden, weight, targets, V)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = (hidden @ weight[:V].t()).to(wide)
    plain = F.cross_entropy(logits, targets, ignore_index=-100)
    assert ours.dtype == wide
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=0)
    for a, b in zip(
        torch.autograd.grad(3.0 * ours, [hidden, weight]),
        torch.autograd.grad(3.0 * plain, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("chunk", [1, 7 * 64, 10**9])
@pytest.mark.parametrize("rows", [V, 64])
def test_equals_plain_cross_entropy_in_float64(monkeypatch, chunk, rows):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    monkeypatch.setattr(loss, "SLICE", 128)
    targets = draw(torch.float64)[2]
    compare(torch.float64, rows, targets, 1e-12)
    targets[3:20] = -100
    compare(torch.float64, rows, targets, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_equals_plain_cross_entropy_to_rounding(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(loss, "CHUNK", 640)
    compare(dtype, 64, draw(dtype)[2], tolerance)


def test_padding_is_never_scored_and_gets_no_gradient():
    hidden, weight, targets = draw(torch.float32, rows=64)
    with torch.no_grad():
        weight[V:] = 1e4
    mean = cross_entropy(hidden, weight, targets, V)
    assert mean.item() == pytest.approx(
        F.cross_entropy(hidden @ weight[:V].t(), targets).item(), rel=1e-5
    )
    assert not torch.autograd.grad(mean, weight)[0][V:].any()


def test_nothing_to_score_is_zero():
    hidden, weight, targets = draw(torch.float32)
    mean = cross_entropy(hidden, weight, torch.full_like(targets, -1), V)
    grads = torch.autograd.grad(mean, [hidden, weight])
    assert mean.item() == 0.0
    assert not any(g.any() for g in grads)


def test_a_hopeless_target_has_a_finite_loss():
    hidden = torch.tensor([[300.0]], requires_grad=True)
    mean = cross_entropy(hidden, torch.tensor([[1.0], [0.0]]), torch.tensor([1]), 2)
    assert mean.item() == pytest.approx(300.0)
    assert torch.autograd.grad(mean, hidden)[0].item() == pytest.approx(1.0)


def test_small_gradients_survive_float16():
    """The loss scale multiplies before anything is rounded away."""
    hidden, weight, targets = draw(torch.float16)
    scaled = cross_entropy(hidden, weight, targets, V) * 2.0**12
    grad = torch.autograd.grad(scaled, hidden)[0].float() / 2.0**12
    exact = torch.autograd.grad(
        F.cross_entropy(hidden.float() @ weight.float().t(), targets), hidden
    )[0]
    torch.testing.assert_close(grad, exact.float(), rtol=2e-2, atol=1e-4)


def test_memory_does_not_hold_the_logits():
    """Bytes saved for the backward pass: two gradients and a scalar, no logits."""
    hidden, weight, targets = draw(torch.float32)
    held: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()), id):
        cross_entropy(hidden, weight, targets, V)
    assert sum(held) == N * D + V * D + 1


def products(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> int:
    """Matrix products of N x V x D that the loss takes."""
    with FlopCounterMode(display=False) as counter:
        cross_entropy(hidden, weight, targets, V)
    return counter.get_total_flops() // (2 * N * V * D)


def test_only_wanted_gradients_are_computed():
    hidden, weight, targets = draw(torch.float32)
    assert products(hidden, weight, targets) == 3
    assert products(hidden.detach(), weight, targets) == 2
    assert products(hidden, weight.detach(), targets) == 2
    with torch.no_grad():
        assert products(hidden, weight, targets) == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fused_form_is_the_sliced_one(dtype):
    logits = torch.randn(N, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[:, V:] = float("-inf")
    logits[0, :] *= 200.0
    targets = torch.randint(0, V, (N,))
    targets[3] = -1
    sliced, fused = logits.clone(), logits.clone()
    total = loss.FORMS["sliced"](sliced, targets)
    eps = torch.finfo(total.dtype).eps
    again = loss.FORMS["compiled"](fused, targets)
    torch.testing.assert_close(again, total, rtol=16 * eps, atol=0)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(fused, sliced, rtol=2 * rounding, atol=2 * eps)


@pytest.mark.parametrize("form", ["sliced", "compiled", "expressions"])
def test_every_form_leaves_padding_alone(form, monkeypatch):
    if form == "compiled" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(loss, "loss_form", lambda *_: form)
    hidden, weight, targets = draw(torch.float32, rows=64)
    with torch.no_grad():
        weight[V:] = 1e4
    mean = cross_entropy(hidden, weight, targets, V)
    plain = F.cross_entropy(hidden @ weight[:V].t(), targets).item()
    assert mean.item() == pytest.approx(plain, rel=1e-5)
    assert not torch.autograd.grad(mean, weight)[0][V:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1 << 29, 1 << 24])
def test_the_loss_on_cuda_equals_float64(monkeypatch, chunk):
    """At GPT-2's vocabulary, padded; and bit for bit the same again."""
    monkeypatch.setattr(loss, "CUDA_CHUNK", chunk)
    generator = torch.Generator("cuda").manual_seed(1)
    draws = {"generator": generator, "device": "cuda"}
    hidden = torch.randn(1000, 64, **draws).bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(50_304, 64, **draws)).bfloat16().requires_grad_()
    targets = torch.randint(0, 50_257, (1000,), **draws)
    targets[3:20] = -1
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = (exact[0] @ exact[1][:50_257].t())[targets >= 0]
    plain = F.cross_entropy(logits, targets[targets >= 0])
    expected = torch.autograd.grad(plain, exact)
    runs = []
    for _ in range(2):
        mean = cross_entropy(hidden, weight, targets, 50_257)
        runs.append([mean, *torch.autograd.grad(mean, [hidden, weight])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert mean.item() == pytest.approx(plain.item(), rel=1e-3)
    for ours, wanted in zip(runs[0][1:], expected, strict=True):
        error = 2e-2 * wanted.abs().max().item()
        torch.testing.assert_close(ours.double(), wanted, rtol=2e-2, atol=error)
    assert not runs[0][2][50_257:].any()

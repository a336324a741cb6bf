"""Every form of attention against the mask written out, in float64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from megagpt.model.kernels import attention
from megagpt.model.kernels import attention_cpu as tiled
from megagpt.model.kernels.attention import attend, attend_slowly, visible


def draw(t: int, s: int, heads: int = 2, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(t * 1000 + s)
    return [
        torch.randn(batch, n, heads, 4, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for n in (t, s, s)
    ]


def check(t: int, s: int, band: int | None, form=attend) -> None:
    inputs = draw(t, s)
    ours, reference = form(*inputs, band), attend_slowly(*inputs, band)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    direction = torch.randn_like(reference)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, direction),
        torch.autograd.grad(reference, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_reference_by_hand():
    """A query sees exactly `band` keys, itself included: i - j <= band - 1 and j <= i."""
    rows = ["1....", "11...", ".11..", "..11.", "...11"]
    expected = torch.tensor([[c == "1" for c in row] for row in rows])
    assert torch.equal(visible(5, 5, 2, torch.device("cpu")), expected)
    assert torch.equal(visible(2, 5, 2, torch.device("cpu")), expected[3:])
    assert visible(5, 5, None, torch.device("cpu")).sum() == 15


@pytest.mark.parametrize("band", [None, 1, 2, 3, 8, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("t", [1, 2, 16, 31, 32, 33, 47])
def test_equals_the_reference(t, band):
    check(t, t, band)


@pytest.mark.parametrize("band", [None, 1, 5, 8, 9, 20, 40])
@pytest.mark.parametrize("t", [1, 7, 8, 9, 33])
def test_the_tiled_form_equals_the_reference(monkeypatch, t, band):
    monkeypatch.setattr(tiled, "TILE", 8)
    check(t, t, band, tiled.attend_tiled)


@pytest.mark.parametrize("tiles", [False, True])
def test_bf16_is_as_near_as_bf16_can_be(monkeypatch, tiles):
    """By this package's tiles, where a CPU multiplies bf16 by itself, and by torch's kernels."""
    monkeypatch.setattr(attention, "BF16_PRODUCTS", tiles)
    form = attention.attention_form("cpu", torch.bfloat16, False, 0.0, 64)
    assert form == ("tiles" if tiles else "sdpa")
    inputs = [x.detach().bfloat16() for x in draw(300, 300)]
    for band in (None, 40):
        reference = attend_slowly(*(x.double() for x in inputs), band)
        torch.testing.assert_close(
            attend(*inputs, band).double(), reference, rtol=2**-6, atol=2**-6
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.one_of(st.none(), st.integers(1, 45)), st.data())
def test_equals_the_reference_after_a_cache(t, past, band, data):
    check(t, t + past, band)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("t", "band"), [(130, 7), (129, 128), (40, 1)])
def test_flex_attention_equals_the_reference(t, band):
    """The form for CUDA, run here by its own slow interpreter, which is forward only."""
    q, k, v = (x.detach() for x in draw(t, t))
    mask = attention.make_block_mask(t, band, q.device)
    ours = flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(ours, attend_slowly(q, k, v, band), rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 80, 96, 128])
@pytest.mark.parametrize(("t", "band"), [(2048, 256), (1000, 129), (512, None)])
def test_forward_and_backward_on_cuda(t, band, width, dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (2, t, 3, 2, width)
    qkv = torch.randn(shape, generator=generator, device="cuda", dtype=dtype).requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    mask = None if band is None else attention.make_block_mask(t, band, qkv.device)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference = attend_slowly(*exact, band)
    ours = attend(q, k, v, band, 0.0, mask)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(ours.double(), reference, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(reference)
    reference.backward(direction)
    ours.backward(direction.to(dtype))
    gradients = torch.stack([x.grad.transpose(1, 2) for x in exact], 2)
    scale = gradients.abs().max().item()
    torch.testing.assert_close(qkv.grad.double(), gradients, rtol=0, atol=tolerance * scale)


@pytest.mark.gpu
def test_a_band_takes_no_memory_for_scores_on_cuda():
    """Forward and backward at 8,192: T x T scores of 4 heads in fp32 alone would be 1 GiB."""
    t, band = 8192, 256
    q, k, v = (
        torch.randn(1, 4, t, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    mask = attention.make_block_mask(t, band, q.device)
    attend(q, k, v, band, 0.0, mask).sum().backward()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, v, band, 0.0, mask).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * q.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("band", [None, 256])
def test_the_deterministic_backward_pass_is_bit_for_bit_the_same_on_cuda(monkeypatch, band):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    q, k, v = (
        torch.randn(2, 8, 2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    mask = None if band is None else attention.make_block_mask(2048, band, q.device)
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            y = attend(q, k, v, band, 0.0, mask)
            gradients.append(torch.autograd.grad(y.sum(), (q, k, v)))
    finally:
        torch.use_deterministic_algorithms(False)
    for again in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 64, 4)
    mean = torch.stack([attend(q, k, k + 1, 8, dropout=0.5) for _ in range(200)]).mean()
    assert mean.item() == pytest.approx(1.0, abs=0.05)


def test_banded_memory_grows_linearly():
    """Bytes saved for the backward pass: twice the context, twice the bytes."""

    def saved(t: int, band: int) -> int:
        held: list[int] = []
        q, k, v = (torch.randn(1, 2, t, 8, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.nbytes), id):
            attend(q, k, v, band, dropout=0.1)  # the plain form, which saves its weights
        return sum(held)

    assert saved(2048, 16) < 2.2 * saved(1024, 16)
    assert saved(1024, 16) < saved(1024, 1024) / 8

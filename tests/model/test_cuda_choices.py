"""The branches for CUDA without a GPU: every family with CUDA's kernels, forward and backward.

Values on a CPU, where flex_attention is traced and run as plain operators; shapes of the presets on
the meta device; where torch is a CUDA build, the forward pass on fake CUDA tensors (its backward
pass would ask for a real card).
"""

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention

from megagpt.config.presets import PRESETS
from megagpt.engine.compiler import compile_model
from megagpt.model import GPT, gpt
from megagpt.model.kernels import attention, loss
from tests.model.test_model import FAMILIES, batch, build, family

TRITON = importlib.util.find_spec("triton") is not None
PRESETS_OF_FAMILIES = ("gpt1", "gpt2-124m", "gpt3-125m", "igpt-s")


@torch.compiler.disable
def nothing_is_missing() -> str:
    """For Triton; as it looks for files, no compiled graph may ask for it."""
    return ""


@pytest.fixture
def cuda_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels are chosen as on CUDA, whatever the device; the forms that were asked for, in order.

    Dynamo and autograd work as they do there. Only Inductor, whose kernels need the card, gives way
    to the operators that it was handed.
    """
    asked: list[str] = []

    def on_cuda(form, _: str, *arguments: object, **options: object) -> str:
        asked.append(form("cuda", *arguments, **options))
        return asked[-1]

    chosen = functools.partial(on_cuda, attention.attention_form)
    monkeypatch.setattr(gpt, "attention_form", chosen)
    monkeypatch.setattr(attention, "_takes_tiles", lambda *_: False)
    monkeypatch.setattr(loss, "loss_form", functools.partial(on_cuda, loss.loss_form))
    monkeypatch.setattr(attention, "missing_for_triton", nothing_is_missing)
    attention._flex_fuses.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    attention._compiled_flex.cache_clear()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    counters.clear()
    yield asked
    attention._compiled_flex.cache_clear()
    attention._flex_fuses.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["no", "blocks"])
@pytest.mark.parametrize("config", FAMILIES, ids=family)
def test_every_family_with_cudas_kernels_is_the_plain_model(config, mode, request, monkeypatch):
    """In bf16 against float64; the loss without Triton's kernel, which has a test of its own."""
    config = dataclasses.replace(config, n_layer=4, n_head=2, vocab_multiple=128)
    x, y = batch(config)
    y = y.clone()
    y[0, :3] = -1
    plain = build(config)
    if plain.head is not None:  # Image GPT's begins at zero, and with it every gradient but its own
        torch.nn.init.normal_(plain.head.weight, std=0.1)
    exact, model = copy.deepcopy(plain).double(), plain.bfloat16()
    expected = exact(x, y)
    expected.backward()
    asked = request.getfixturevalue("cuda_choices")
    monkeypatch.setattr(loss, "missing_for_triton", lambda: "it")
    compile_model(model, mode)
    found = model(x, y)
    found.backward()
    assert {"flex", "expressions"} == set(asked)
    # A dense and a banded block, or a band's attention alone: layers share what was compiled.
    assert counters["stats"]["unique_graphs"] == (2 if mode == "blocks" else 1)
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.03, (name, error)


@pytest.mark.parametrize("preset", PRESETS_OF_FAMILIES)
def test_every_presets_shapes_with_cudas_kernels(cuda_choices, monkeypatch, preset):
    """Forward and backward of two layers at full width on the meta device, micro-batch 4."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # no such mode on meta
    monkeypatch.setattr(loss, "missing_for_triton", lambda: "" if TRITON else "it")
    config = dataclasses.replace(PRESETS[preset].model, n_layer=2, dropout=0.0, vocab_multiple=128)
    with torch.device("meta"):
        model = GPT(config).bfloat16()
        ids = torch.zeros(4, config.n_ctx, dtype=torch.int64)
        model(ids, ids).backward()
    assert ("flex" in cuda_choices) == ("banded" in config.attention)
    assert cuda_choices[-1] == ("triton" if TRITON else "expressions")
    for name, p in model.named_parameters():
        assert (p.grad.shape, p.grad.dtype) == (p.shape, torch.bfloat16), name


@pytest.mark.skipif(torch.version.cuda is None, reason="fake CUDA tensors need a CUDA build")
@pytest.mark.parametrize("preset", PRESETS_OF_FAMILIES)
def test_the_forward_pass_on_fake_cuda_tensors(cuda_choices, monkeypatch, preset):
    """Nothing of it is left on the CPU; in the dense layers with the loss's gradients too."""
    monkeypatch.setattr(loss, "CUDA_CHUNK", 1 << 27)  # several chunks, whose products are wide
    config = dataclasses.replace(PRESETS[preset].model, n_layer=2, dropout=0.0, vocab_multiple=128)
    banded = "banded" in config.attention
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be turned into others
        try:
            model = GPT(config)
        finally:
            torch.set_default_dtype(torch.float32)
        ids = torch.zeros(4, config.n_ctx, dtype=torch.int64)
        with torch.set_grad_enabled(not banded):
            found = model(ids, ids)
    assert found.device.type == "cuda" and found.dtype == torch.float32
    assert {"flex"} & set(cuda_choices) == ({"flex"} if banded else set())

"""The model: names, splitting into a list, cache, recomputation, learning, compilation."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError
from megagpt.model import GPT, decays, head_loss, initialise, layers
from megagpt.model.cache import Cache
from tests.lib.weights import banded

BANDED = banded(n_layer=3, n_head=4, n_ctx=24, vocab_size=61, vocab_multiple=16, band_width=5)
FAMILIES = [dataclasses.replace(BANDED, family=f) for f in ("gpt2", "gpt1", "igpt")]


def build(config: ModelConfig, **options: int) -> GPT:
    model = GPT(config, **options)
    initialise(model.named_parameters(), config, seed=5)
    return model


def batch(config: ModelConfig, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, config.vocab_size, (n, config.n_ctx + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def family(config: ModelConfig) -> str:
    return config.family


def test_names_are_gpt2s():
    names = list(build(BANDED).state_dict())
    assert names[:2] == ["wte.weight", "wpe.weight"]
    assert names[-2:] == ["ln_f.weight", "ln_f.bias"]
    assert [n.removeprefix("h.1.") for n in names if n.startswith("h.1.")] == [
        f"{layer}.{kind}"
        for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ]
    assert build(BANDED).state_dict()["h.0.mlp.c_fc.weight"].shape == (128, 32)
    assert build(BANDED).state_dict()["wte.weight"].shape == (64, 32)


def test_names_of_the_other_families():
    gpt1, igpt = (list(build(c).state_dict()) for c in FAMILIES[1:])
    assert not any(name.startswith("ln_f") for name in gpt1)
    assert not any(name.endswith("bias") for name in igpt)
    assert igpt[-1] == "head.weight"
    shapes = build(FAMILIES[2]).state_dict()
    assert (shapes["wte.weight"].shape, shapes["head.weight"].shape) == ((64, 32), (64, 32))


@pytest.mark.parametrize("config", FAMILIES, ids=family)
def test_the_list_of_layers_is_the_model(config):
    """A pipeline that builds and chains the list computes what GPT computes."""
    model, (x, y) = build(config), batch(config)
    chain = layers(config)
    names = ["wte", "wpe", *(f"h.{i}" for i in range(config.n_layer)), "ln_f", "head"]
    if config.family == "gpt1":
        names.remove("ln_f")
    assert [layer.name for layer in chain] == names
    built, hidden = {}, x
    for layer in chain[:-1]:
        built[layer.name] = module = layer.cls(**layer.kwargs)
        pairs = ((f"{layer.name}.{n}", p) for n, p in module.named_parameters())
        initialise(pairs, config, seed=5)
        hidden = module(hidden)
    head = chain[-1]
    module = built[head.tied_to] if head.tied_to else head.cls(**head.kwargs)
    if not head.tied_to:
        initialise([("head.weight", module.weight)], config, seed=5)
    assert torch.equal(head.loss(module, hidden, y), model(x, y))


def test_a_tied_head_can_be_built_from_the_embeddings_class():
    """DeepSpeed builds the tied layer a second time on the last stage and copies the weight."""
    first, *_, head = layers(BANDED)
    assert (head.cls, head.kwargs, head.tied_to) == (first.cls, first.kwargs, "wte")
    assert all(issubclass(layer.cls, torch.nn.Module) for layer in layers(BANDED))


def test_building_on_the_meta_device_costs_nothing():
    with torch.device("meta"):
        model = GPT(dataclasses.replace(BANDED, d_model=12288, n_head=96, n_layer=96))
    assert all(p.is_meta for p in model.parameters())
    assert model.h[95].mlp.c_fc.weight.shape == (49152, 12288)


def next_logits(model: GPT, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits (B, V) of what follows ids (B, T), which continue the texts in the cache."""
    return model.scores(model.read(ids, cache)[:, -1])


@pytest.mark.parametrize("config", FAMILIES, ids=family)
@pytest.mark.parametrize("pieces", [[24], [1] * 24, [7, 1, 1, 9, 6], [3, 8, 13]])
def test_cache_equals_the_full_forward_pass(config, pieces):
    model = build(config).double()
    if config.family == "igpt":
        torch.nn.init.normal_(model.head.weight)  # starts at zero
    x, _ = batch(config)
    logits, cache, start = model.logits(x), model.new_cache(2), 0
    assert logits.shape == (2, 24, 61)
    for piece in pieces:
        ours = next_logits(model, x[:, start : start + piece], cache)
        start += piece
        torch.testing.assert_close(ours, logits[:, start - 1], rtol=0, atol=1e-12)
    assert cache.lengths == [24, 24]


def test_a_banded_layers_cache_does_not_grow_with_the_text():
    model, cache = build(BANDED), build(BANDED).new_cache(2)
    next_logits(model, batch(BANDED)[0], cache)
    assert cache.layers[1].k.shape[2] == BANDED.band_width
    assert cache.layers[0].k.shape[2] == BANDED.n_ctx


def test_text_beyond_the_context_is_refused():
    model, cache = build(BANDED), build(BANDED).new_cache(1)
    next_logits(model, torch.zeros(1, 24, dtype=torch.int64), cache)
    with pytest.raises(UsageError, match="25 positions, but the model's context is 24 tokens"):
        next_logits(model, torch.zeros(1, 1, dtype=torch.int64), cache)
    with pytest.raises(UsageError, match="shorten the text"):
        model.logits(torch.zeros(1, 30, dtype=torch.int64))


@pytest.mark.parametrize("every", [1, 2])
def test_recomputation_is_bit_for_bit_the_same_with_dropout(every):
    config = dataclasses.replace(BANDED, dropout=0.2)
    x, y = batch(config)
    grads = []
    for k in (0, every):
        model = build(config, recompute_every=k).train()
        torch.manual_seed(0)
        model(x, y).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_recomputation_drops_the_blocks_activations():
    saved = []
    for k in (0, 1):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, h=held: h.append(t.numel()), id):
            build(BANDED, recompute_every=k)(*batch(BANDED))
        saved.append(sum(held))
    assert saved[1] < saved[0] / 3


def test_dropout_only_acts_in_training():
    config = dataclasses.replace(BANDED, dropout=0.5)
    model, (x, y) = build(config), batch(config)
    assert model(x, y) != model(x, y)
    model.eval()
    assert model(x, y) == model(x, y) == build(BANDED)(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overfits_one_batch(dtype):
    """bf16 as the engine trains: bf16 weights, fp32 masters."""
    model = build(BANDED)
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-2, weight_decay=0.0)
    model.to(dtype)
    x, y = batch(BANDED)
    for _ in range(120):
        loss = model(x, y)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad.float()
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters, strict=True):
                parameter.copy_(master)
    assert loss.dtype == torch.float32
    assert loss.item() < 0.05


@pytest.mark.skipif(not shutil.which("g++"), reason="the loss is fused by a C++ compiler")
@pytest.mark.parametrize("config", FAMILIES, ids=family)
def test_compiles_as_one_graph(config):
    """aot_eager traces forward and backward as the compilers do."""
    model, (x, y) = build(config), batch(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(model(x, y), list(model.parameters()))
    traced = torch.autograd.grad(compiled(x, y), list(model.parameters()))
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_autocast_trains_fp32_weights():
    model, (x, y) = build(BANDED), batch(BANDED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, y)
    loss.backward()
    assert loss.dtype == model.wte.weight.grad.dtype == torch.float32
    assert abs(loss.item() - build(BANDED)(x, y).item()) < 0.01


def test_weight_decay_is_for_matrices():
    names = [name for name, _ in build(BANDED).named_parameters()]
    kept = [name.split(".", 2)[-1] for name in names if not decays(name)]
    assert {"ln_1.weight", "ln_2.bias", "attn.c_attn.bias", "mlp.c_proj.bias"} <= set(kept)
    for name, parameter in build(BANDED).named_parameters():
        assert decays(name) == (parameter.dim() == 2), name


def test_split_parts_replace_the_layers():
    """The head's width, not the config, decides the heads of this rank."""
    model, (x, _) = build(BANDED), batch(BANDED)
    attention = model.h[0].attn
    attention.c_attn.weight = torch.nn.Parameter(
        attention.c_attn.weight.view(3, 4, 8, 32)[:, :2].reshape(48, 32)
    )
    attention.c_attn.bias = torch.nn.Parameter(torch.zeros(48))
    attention.c_proj.weight = torch.nn.Parameter(attention.c_proj.weight[:, :16])
    assert attention(model.wte(x)).shape == (2, 24, 32)
    assert head_loss(model.wte, model.wte(x), x).shape == ()


def test_importing_the_model_loads_no_deepspeed():
    code = "import sys, megagpt.model; print('deepspeed' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"

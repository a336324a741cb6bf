"""Hugging Face transformers with random weights computes what our families compute."""

import pytest
import torch
import torch.nn.functional as F

from megagpt.config.presets import ModelConfig
from megagpt.model import GPT, initialise
from tests.lib.weights import banded

transformers = pytest.importorskip("transformers")

SHAPES = [(1, 2, 16, 12, 31), (2, 4, 32, 16, 61), (3, 3, 48, 9, 50)]
"""n_layer, n_head, d_model, n_ctx, vocab_size."""


def sizes(shape: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("n_layer", "n_head", "d_model", "n_ctx", "vocab_size"), shape, strict=True))


def ours(family: str, shape: tuple[int, ...], dtype: torch.dtype) -> GPT:
    config = ModelConfig(family=family, **sizes(shape))
    model = GPT(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # every tensor random, biases and gains too
        torch.nn.init.normal_(parameter, 0.0, 0.1, generator=generator)
    return model.to(dtype).eval()


def theirs(family: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Module:
    n_layer, n_head, d_model, n_ctx, vocab = shape
    common = {"n_layer": n_layer, "n_head": n_head, "n_embd": d_model, "n_positions": n_ctx}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if family == "gpt2":
        config = transformers.GPT2Config(**common, **dropout, vocab_size=vocab)
        model = transformers.GPT2LMHeadModel(config)
    elif family == "gpt1":
        config = transformers.OpenAIGPTConfig(**common, **dropout, vocab_size=vocab)
        model = transformers.OpenAIGPTLMHeadModel(config)
    else:
        config = transformers.ImageGPTConfig(
            **common, **dropout, vocab_size=vocab + 1, attn_implementation="eager"
        )
        model = transformers.ImageGPTForCausalImageModeling(config)
    return model.to(dtype).eval()


def pairs(family: str, mine: GPT, other: torch.nn.Module) -> list[tuple[torch.Tensor, ...]]:
    """(our parameter, theirs, whether theirs is transposed), for each of our parameters."""
    named = dict(other.named_parameters())
    renamed = {"wte": "tokens_embed", "wpe": "positions_embed"} if family == "gpt1" else {}
    found = []
    for name, parameter in mine.named_parameters():
        layer, rest = name.split(".", 1)
        key = f"transformer.{renamed.get(layer, layer)}.{rest}"
        key = "lm_head.weight" if name == "head.weight" else key
        turned = name.endswith("weight") and (".attn.c" in name or ".mlp.c" in name)
        found.append((parameter, named[key], turned))
    # Whatever is theirs alone must be zero: Image GPT's biases, which OpenAI's code does not have.
    used = {id(theirs) for _, theirs, _ in found}
    assert all(not p.any() for p in other.parameters() if id(p) not in used)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "gpt1", "igpt"])
def test_logits_loss_and_gradients_equal_transformers(family, shape, dtype):
    mine, other = ours(family, shape, dtype), theirs(family, shape, dtype)
    matched = pairs(family, mine, other)
    with torch.no_grad():
        for parameter, theirs_, turned in matched:
            theirs_.copy_(parameter.t() if turned else parameter)
    config = mine.config
    ids = torch.randint(0, config.vocab_size, (2, config.n_ctx + 1))
    x, y = ids[:, :-1].clone(), ids[:, 1:]
    if config.start_token is not None:
        x[:, 0] = config.start_token
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5

    logits = other(x).logits
    torch.testing.assert_close(mine.logits(x), logits, rtol=tolerance, atol=tolerance)

    loss, expected = mine(x, y), F.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=tolerance, atol=0)
    loss.backward()
    expected.backward()
    for parameter, theirs_, turned in matched:
        grad = theirs_.grad.t() if turned else theirs_.grad
        torch.testing.assert_close(parameter.grad, grad, rtol=tolerance, atol=tolerance)


def test_banded_layers_equal_gpt_neo():
    """GPT-Neo's local attention, from transformers: the same band in the same layers."""
    config = banded(n_layer=4, d_model=16, n_ctx=23, vocab_size=31, band_width=5)
    mine = GPT(config).double()
    initialise(mine.named_parameters(), config, seed=2)
    other = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=31,
            max_position_embeddings=23,
            hidden_size=16,
            num_layers=4,
            num_heads=2,
            attention_types=[[["global", "local"], 2]],
            window_size=5,
            resid_dropout=0.0,
            embed_dropout=0.0,
            attention_dropout=0.0,
            attn_implementation="eager",
        )
    ).double()
    state = mine.state_dict()
    with torch.no_grad():
        for name, parameter in other.transformer.named_parameters():
            parameter.copy_(_neo(name, state, config.d_head))
    x = torch.randint(0, 31, (2, 23))
    # GPT-Neo computes its scores in fp32, whatever the model's dtype.
    torch.testing.assert_close(mine.logits(x), other(x).logits, rtol=1e-4, atol=1e-5)


def _neo(name: str, state: dict[str, torch.Tensor], d_head: int) -> torch.Tensor:
    """Our weights under GPT-Neo's name; it does not divide its scores by sqrt(d_head)."""
    d = 16
    for part, letter in enumerate("qkv"):
        if name.endswith(f"{letter}_proj.weight"):
            stem = name.removesuffix(f"attn.attention.{letter}_proj.weight")
            rows = state[f"{stem}attn.c_attn.weight"][part * d : (part + 1) * d]
            return rows / d_head**0.5 if letter == "q" else rows
    return state[name.replace("attn.attention.out_proj", "attn.c_proj")]

"""What others trained comes in exactly, or is refused by the name of what we cannot compute."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megagpt.checkpoint import load_model
from megagpt.checkpoint.export import open_weights
from megagpt.errors import DamageError, UsageError
from megagpt.hub.importing import import_model
from megagpt.hub.weight_files import open_foreign
from tests.lib.foreign import SIZES, same_logits, theirs, transformers, with_config
from tests.lib.refusals import refused

# --- GPT-2 in all the forms that it lies in -------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["safetensors", "shards", "bin", "old bin", "hub", "tied", "head alone"]
)
def test_gpt2_in_every_form(form, tmp_path):
    model, folder = theirs(), tmp_path / "theirs"
    model.save_pretrained(folder, max_shard_size="8KB" if form == "shards" else "5GB")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (form == "shards")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if form != "shards" and form != "safetensors":
        (folder / "model.safetensors").unlink()
    if form.endswith("bin"):
        zipped = form == "bin"
        path = folder / "pytorch_model.bin"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    if form == "hub":  # as OpenAI's weights lie on the hub: no prefix, masks among them
        old = {n.removeprefix("transformer."): v for n, v in state.items() if "lm_head" not in n}
        for layer in range(2):
            old[f"h.{layer}.attn.bias"] = torch.ones(12, 12).tril().view(1, 1, 12, 12)
            old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(old, folder / "model.safetensors")
    if form == "tied":
        save_file({n: v.clone() for n, v in state.items()}, folder / "model.safetensors")
    if form == "head alone":
        del state["transformer.wte.weight"]
        save_file(state, folder / "model.safetensors")
    import_model(str(folder), tmp_path / "in", tokenizer="bytes")
    same_logits(tmp_path / "in", model)
    # A file of the folder stands for it.
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    import_model(str(files[0]), tmp_path / "by file", tokenizer="bytes")
    same_logits(tmp_path / "by file", model)


@pytest.mark.parametrize(
    "keys",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"activation_function": "gelu"},
        {"reorder_and_upcast_attn": True},
    ],
    ids=str,
)
def test_what_differs_in_arithmetic_alone_is_absorbed(keys, tmp_path):
    model = theirs(**keys)
    model.save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "in", tokenizer="bytes")
    same_logits(tmp_path / "in", model)


def test_gpt_neo(tmp_path):
    torch.manual_seed(5)
    config = transformers.GPTNeoConfig(
        vocab_size=257,
        max_position_embeddings=12,
        hidden_size=160,
        num_layers=3,
        num_heads=2,
        attention_types=[[["global", "local", "local"], 1]],
        window_size=4,
    )
    model = transformers.GPTNeoForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    model.save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "in", tokenizer="bytes")
    same_logits(tmp_path / "in", model)
    found = open_weights(tmp_path / "in").config.model
    assert found.attention == ("dense", "banded", "banded") and found.band_width == 4
    with_config(tmp_path / "theirs", attention_types=[[["global", "sparse"], 2]])
    refused(tmp_path / "theirs", "attention_types = .*for each of the 3 layers")


def test_what_cannot_be_computed_is_refused_by_its_key(tmp_path):
    folder = tmp_path / "theirs"
    theirs().save_pretrained(folder)
    good = (folder / "config.json").read_text()
    for key, value in (
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 80),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("quantization_config", {"bits": 4}),
        ("scale_attn_by_inverse_layer_idx", "yes"),
    ):
        with_config(folder, **{key: value})
        refused(folder, f"{key} = .*: our model computes only")
        (folder / "config.json").write_text(good)
    for key, value, rule in (
        ("model_type", "llama", "must be one of gpt2, gpt_neo, openai-gpt, imagegpt"),
        ("n_layer", "two", "must be a whole number of 1 or more"),
        ("n_head", 3, "must be a multiple of n_head"),
        ("resid_pdrop", 1.5, "model.dropout = 1.5: must be less than 1"),
    ):
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop"), value) if "pdrop" in key else {}
        with_config(folder, **{key: value}, **rates)
        refused(folder, rule)
        (folder / "config.json").write_text(good)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_tensors_are_those_of_the_model(tmp_path):
    folder = tmp_path / "theirs"
    model = theirs()
    model.save_pretrained(folder)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    norm = "transformer.h.1.ln_2.weight"

    def wrong(match: str, **changes: Any) -> None:
        tensors = {n: v for n, v in (state | changes).items() if v is not None}
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(UsageError, match=match):
            import_model(str(folder), tmp_path / "in", tokenizer="bytes")

    wrong("1 tensors are not .*: transformer.h.1.ln_2.weight is missing", **{norm: None})
    wrong("transformer.h.2.x is none of the model's", **{"h.2.x": torch.zeros(1)})
    wrong("ln_2.weight: has shape .*but .16,. in the model", **{norm: torch.zeros(17)})
    wrong("is of torch.int8: must be of a float type", **{norm: torch.ones(16).to(torch.int8)})
    for value in (math.nan, math.inf, 1e39):
        broken = torch.ones(16, dtype=torch.float64)
        broken[3] = value
        wrong("ln_2.weight holds 1 of 16 numbers like (nan|inf): all must be f", **{norm: broken})
    wrong("lm_head.weight: is not the embedding", **{"lm_head.weight": torch.ones(257, 16)})
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no model.safetensors or pytorch_model.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_damaged_files_are_named(tmp_path):
    folder = tmp_path / "theirs"
    theirs().save_pretrained(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-9])
    refused(folder, "model.safetensors: not readable", DamageError)
    index = {"weight_map": {"wte.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "names '../model.safetensors', which is no file of", DamageError)
    index = {"weight_map": {"wte.weight": "absent.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "tensors are not those of the model")
    index = {"weight_map": {"wte.weight": 1}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "its index names 1, which is no file of the folder", DamageError)
    index = {"weight_map": {"wte.weight": "absent.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamageError, match="wte.weight is not readable"):
        open_foreign(str(folder)).read("wte.weight")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json: not a JSON object", DamageError)
    for broken in ("{", "[" * 100_000):
        (folder / "config.json").write_text(broken)
        refused(folder, "config.json: not readable as JSON", DamageError)


# --- the other classes ----------------------------------------------------------------------------


def test_image_gpt_without_biases(tmp_path):
    config = transformers.ImageGPTConfig(**SIZES | {"vocab_size": 65})
    model = transformers.ImageGPTForCausalImageModeling(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 0, 0.0 if name.endswith("bias") else 0.1)
    model.save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "in")
    found = open_weights(tmp_path / "in")
    assert found.config.model.family == "igpt" and found.config.model.vocab_size == 64
    head = model.lm_head.weight
    assert torch.equal(found.read("head.weight"), head)
    torch.nn.init.ones_(model.transformer.h[1].mlp.c_fc.bias)
    model.save_pretrained(tmp_path / "theirs")
    refused(tmp_path / "theirs", "h.1.mlp.c_fc.bias: must be 0 everywhere")
    with pytest.raises(UsageError, match="the tokenizer of these weights is not known"):
        load_model(tmp_path / "in")


def gpt1_files(folder: Path) -> Any:
    """GPT-1 of transformers, saved as OpenAI's numpy files are."""
    torch.manual_seed(5)
    sizes = SIZES | {"n_embd": 128}
    model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    of = {name: value.numpy() for name, value in model.state_dict().items()}
    order = [of["transformer.positions_embed.weight"], of["transformer.tokens_embed.weight"]]
    for layer in range(2):
        for leaf in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"):
            weight = of[f"transformer.h.{layer}.{leaf}.weight"]
            order += [weight[None] if weight.ndim == 2 else weight]
            order += [of[f"transformer.h.{layer}.{leaf}.bias"]]
    folder.mkdir()
    flat = np.concatenate([value.ravel() for value in order])
    (folder / "params_shapes.json").write_text(json.dumps([list(v.shape) for v in order]))
    for number, part in enumerate(np.array_split(flat, 10)):
        np.save(folder / f"params_{number}.npy", part)
    return model


def test_gpt1_of_transformers_and_of_openai(tmp_path):
    model = gpt1_files(tmp_path / "openai")
    model.save_pretrained(tmp_path / "theirs")
    for name in ("openai", "theirs"):
        import_model(str(tmp_path / name), tmp_path / f"{name}-in", tokenizer="bytes")
        same_logits(tmp_path / f"{name}-in", model)
    shapes = tmp_path / "openai" / "params_shapes.json"
    whole = shapes.read_text()
    shapes.write_text(json.dumps([[sum(math.prod(shape) for shape in json.loads(whole))]]))
    refused(tmp_path / "openai", "its shapes are not those of two embeddings and 12", DamageError)
    shapes.write_text(whole)
    (tmp_path / "openai" / "params_9.npy").unlink()
    refused(tmp_path / "openai", "not OpenAI's files of GPT-1 .its shapes tell of", DamageError)
    with_config(tmp_path / "theirs", afn="relu")
    refused(tmp_path / "theirs", "afn = 'relu': our model computes only 'gelu'")

"""What others trained comes in exactly, or is refused by the name of what we cannot compute."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megagpt.checkpoint import load_model
from megagpt.checkpoint.export import open_weights
from megagpt.cli import main
from megagpt.errors import DamageError, UsageError
from megagpt.hub.importing import import_model
from megagpt.hub.tensorflow import Bundle
from megagpt.hub.weight_files import open_foreign
from megagpt.tokenizer import fingerprint, load_tokenizer

transformers = pytest.importorskip("transformers")

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 257}
IDS = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(3))


def theirs(**more: Any) -> Any:
    """A GPT-2 of transformers with random weights, biases too."""
    torch.manual_seed(5)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **more)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return model


def ours(folder: Path) -> torch.Tensor:
    """Our logits of IDS."""
    with torch.no_grad():
        return load_model(folder)[0].logits(IDS)


def same_logits(folder: Path, model: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(folder), model(IDS).logits, rtol=1e-5, atol=2e-6)


def with_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))


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
    with pytest.raises(UsageError, match="attention_types = .*for each of the 3 layers"):
        import_model(str(tmp_path / "theirs"), tmp_path / "other")


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
        with pytest.raises(UsageError, match=f"{key} = .*: our model computes only"):
            import_model(str(folder), tmp_path / "in")
        (folder / "config.json").write_text(good)
    for key, value, rule in (
        ("model_type", "llama", "must be one of gpt2, gpt_neo, openai-gpt, imagegpt"),
        ("n_layer", "two", "must be a whole number of 1 or more"),
        ("n_head", 3, "must be a multiple of n_head"),
        ("resid_pdrop", 1.5, "model.dropout = 1.5: must be less than 1"),
    ):
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop"), value) if "pdrop" in key else {}
        with_config(folder, **{key: value}, **rates)
        with pytest.raises(UsageError, match=rule):
            import_model(str(folder), tmp_path / "in")
        (folder / "config.json").write_text(good)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_tensors_are_those_of_the_model(tmp_path):
    folder = tmp_path / "theirs"
    model = theirs()
    model.save_pretrained(folder)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    norm = "transformer.h.1.ln_2.weight"

    def refused(match: str, **changes: Any) -> None:
        tensors = {n: v for n, v in (state | changes).items() if v is not None}
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(UsageError, match=match):
            import_model(str(folder), tmp_path / "in", tokenizer="bytes")

    refused("1 tensors are not .*: transformer.h.1.ln_2.weight is missing", **{norm: None})
    refused("transformer.h.2.x is none of the model's", **{"h.2.x": torch.zeros(1)})
    refused("ln_2.weight: has shape .*but .16,. in the model", **{norm: torch.zeros(17)})
    refused("is of torch.int8: must be of a float type", **{norm: torch.ones(16).to(torch.int8)})
    refused("lm_head.weight: is not the embedding", **{"lm_head.weight": torch.ones(257, 16)})
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no model.safetensors or pytorch_model.bin"):
        import_model(str(folder), tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_damaged_files_are_named(tmp_path):
    folder = tmp_path / "theirs"
    theirs().save_pretrained(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-9])
    with pytest.raises(DamageError, match="model.safetensors: not readable"):
        import_model(str(folder), tmp_path / "in")
    index = {"weight_map": {"wte.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamageError, match="names '../model.safetensors', which is no file of"):
        import_model(str(folder), tmp_path / "in")
    index = {"weight_map": {"wte.weight": "absent.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="tensors are not those of the model"):
        import_model(str(folder), tmp_path / "in")
    index = {"weight_map": {"wte.weight": 1}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamageError, match="its index names 1, which is no file of the folder"):
        import_model(str(folder), tmp_path / "in")
    index = {"weight_map": {"wte.weight": "absent.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamageError, match="wte.weight is not readable"):
        open_foreign(str(folder)).read("wte.weight")
    (folder / "config.json").write_text("[]")
    with pytest.raises(DamageError, match="config.json: not a JSON object"):
        import_model(str(folder), tmp_path / "in")
    for broken in ("{", "[" * 100_000):
        (folder / "config.json").write_text(broken)
        with pytest.raises(DamageError, match="config.json: not readable as JSON"):
            import_model(str(folder), tmp_path / "in")


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
    with pytest.raises(UsageError, match="h.1.mlp.c_fc.bias: must be 0 everywhere"):
        import_model(str(tmp_path / "theirs"), tmp_path / "other")
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
    with pytest.raises(DamageError, match="its shapes are not those of two embeddings and 12"):
        import_model(str(tmp_path / "openai"), tmp_path / "other")
    shapes.write_text(whole)
    (tmp_path / "openai" / "params_9.npy").unlink()
    with pytest.raises(DamageError, match="not OpenAI's files of GPT-1 .its shapes tell of"):
        import_model(str(tmp_path / "openai"), tmp_path / "other")
    with_config(tmp_path / "theirs", afn="relu")
    with pytest.raises(UsageError, match="afn = 'relu': our model computes only 'gelu'"):
        import_model(str(tmp_path / "theirs"), tmp_path / "other")


def nano(path: Path, bias: bool, **more: Any) -> Any:
    """ckpt.pt as nanoGPT saves it, and a GPT-2 of transformers that computes what it does."""
    model = theirs(activation_function="gelu")
    state = {}
    for name, value in model.state_dict().items():
        turned = name.endswith(".weight") and any(
            c in name for c in (".c_attn", ".c_fc", ".c_proj")
        )
        if name.endswith(".bias") and not bias:
            value.zero_()
        else:
            state[f"_orig_mod.{name}"] = (value.t() if turned else value).contiguous()
    args = {k: SIZES[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    args |= {"block_size": 12, "bias": bias, "dropout": 0.1, **more}
    torch.save({"model": state, "model_args": args, "iter_num": 7}, path)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(bias, tmp_path):
    model = nano(tmp_path / "ckpt.pt", bias)
    import_model(str(tmp_path / "ckpt.pt"), tmp_path / "in", tokenizer="bytes")
    same_logits(tmp_path / "in", model)
    found = open_weights(tmp_path / "in").config.model
    assert found.activation == "gelu" and found.dropout == 0.1


def test_nanogpt_is_refused_where_it_is_none(tmp_path):
    path = tmp_path / "ckpt.pt"
    nano(path, True, use_relu=True)
    with pytest.raises(UsageError, match="model_args has 'use_relu', which nanoGPT's own"):
        import_model(str(tmp_path), tmp_path / "in")
    torch.save({"model": {}}, path)
    with pytest.raises(UsageError, match="no ckpt.pt of nanoGPT .'model_args' is missing"):
        import_model(str(path), tmp_path / "in")
    torch.save({"model": Bundle}, path)
    with pytest.raises(UsageError, match="holds more than tensors and plain values"):
        import_model(str(path), tmp_path / "in")
    torch.save({"model": {3: torch.zeros(1)}, "model_args": {"block_size": 1}}, path)
    with pytest.raises(UsageError, match="ckpt.pt: has the key 3, which names no tensor"):
        import_model(str(path), tmp_path / "in")
    nano(path, True, dropout=None)
    with pytest.raises(UsageError, match="resid_pdrop = None: must be a number"):
        import_model(str(path), tmp_path / "in")
    nano(path, True)
    tree = torch.load(path)
    tree["model"]["_orig_mod.transformer.wte.weight"] = "x"
    torch.save(tree, path)
    with pytest.raises(UsageError, match="transformer.wte.weight is str: must be a tensor"):
        import_model(str(path), tmp_path / "in")
    torch.save([1], path)
    with pytest.raises(UsageError, match="holds list, not a table of tensors"):
        import_model(str(path), tmp_path / "in")
    path.write_bytes(b"no zip")
    with pytest.raises((UsageError, DamageError), match="ckpt.pt"):
        import_model(str(path), tmp_path / "in")


# --- tokenizers and places ------------------------------------------------------------------------


def test_the_tokenizer_comes_along(tmp_path, caplog):
    folder = tmp_path / "theirs"
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES | {"vocab_size": 50_257, "n_embd": 4, "n_layer": 1})
    )
    model.save_pretrained(folder)
    from megagpt.tokenizer.gpt2 import gpt2_merges
    from megagpt.tokenizer.json import tokenizer_json

    words = tokenizer_json(gpt2_merges())["model"]["vocab"]
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in gpt2_merges())]
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        ids = words | {"<|endoftext|>": len(words)}
        (folder / vocabulary).write_text(json.dumps(ids))
        (folder / merges).write_text("\n".join(lines) + "\n", encoding="utf-8")
        import_model(str(folder), tmp_path / vocabulary)
        found = open_weights(tmp_path / vocabulary)
        assert fingerprint(found.tokenizer()) == fingerprint(load_tokenizer("gpt2"))
        (folder / vocabulary).write_text(json.dumps(ids | {"a": ids["b"]}))
        with caplog.at_level(logging.WARNING):
            import_model(str(folder), tmp_path / f"{vocabulary}-other")
        assert "its ids are not GPT-2's" in caplog.text
        assert "name one with --tokenizer" in caplog.text
        (folder / merges).write_text("a\n")
        caplog.clear()
        import_model(str(folder), tmp_path / f"{vocabulary}-broken")
        assert "not GPT-2's merges" in caplog.text
        (folder / vocabulary).unlink()
    with pytest.raises(UsageError, match="not empty; give a folder that does not exist yet"):
        import_model(str(folder), folder)


def test_rows_that_are_no_token_are_cut_when_the_tokenizer_is_named(tmp_path):
    config = transformers.GPT2Config(**SIZES | {"vocab_size": 320})
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "in", tokenizer="bytes")
    found = open_weights(tmp_path / "in")
    assert found.config.model.vocab_size == 257 and found.read("wte.weight").shape == (257, 16)
    with pytest.raises(UsageError, match="'gpt2' has 50257 tokens, but the model 320"):
        import_model(str(tmp_path / "theirs"), tmp_path / "other", tokenizer="gpt2")


def test_places_that_hold_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["import", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "nothing here that can be imported; give a folder of" in capsys.readouterr().err
    assert main(["import", "/no/such/folder", str(tmp_path / "out")]) == 2
    assert "/no/such/folder: is not there; give" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["import", "nobody/nothing", str(tmp_path / "out")]) == 2
    assert "no repository that the Hugging Face hub gives" in capsys.readouterr().err


def test_a_name_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    """The layout that huggingface_hub keeps: what was fetched once needs no network."""
    repository = tmp_path / "cache" / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs" / "main").write_text(commit)
    model = theirs()
    model.save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    import_model("somebody/tiny", tmp_path / "in", tokenizer="bytes")
    same_logits(tmp_path / "in", model)

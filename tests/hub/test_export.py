"""What is exported is what transformers computes: every class, every shape, through real files."""

import filecmp
import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megagpt.checkpoint.export import open_weights
from megagpt.cli import main
from megagpt.config.presets import PRESETS, ModelConfig
from megagpt.corpus.records import prepare
from megagpt.errors import MegagptError, UsageError
from megagpt.hub.answers import answer
from megagpt.hub.compare import compare, logits_at
from megagpt.hub.exporting import export_model, windows_of, write_export
from megagpt.hub.importing import import_model
from megagpt.hub.naming import exported
from megagpt.hub.shapes import write_config
from megagpt.model import GPT
from megagpt.tokenizer.palette import Palette
from tests.lib.weights import random_value, weights_folder

transformers = pytest.importorskip("transformers")

SMALL = {"n_layer": 3, "n_head": 2, "n_ctx": 40, "vocab_size": 257}
BANDED = {"attention": ("dense", "banded", "banded"), "band_width": 9}
MODELS = {
    "gpt2": {"d_model": 32},
    "gelu": {"d_model": 32, "activation": "gelu"},
    "neo-16": {"d_model": 32, **BANDED},
    "neo-80": {"d_model": 160, **BANDED},
    "neo-96": {"d_model": 192, "attention": ("banded", "dense"), "band_width": 1},
    "gpt1": {"d_model": 32, "family": "gpt1"},
    "igpt": {"d_model": 32, "family": "igpt"},
}


def logits(folder: Path, weights: Path, begin: int = 4) -> tuple[torch.Tensor, ...]:
    """(transformers' logits, ours in fp32, ours in fp64), of full contexts, at 64 positions at
    most. begin: where the greedy continuation begins that is asked for with them."""
    source = open_weights(weights)
    windows, _ = windows_of(source)
    n_ctx = windows.shape[1]
    places = torch.linspace(0, n_ctx - 1, min(64, n_ctx)).long()
    asked = {"windows": windows.tolist(), "positions": places.tolist(), "texts": [], "images": []}
    theirs = answer(folder, asked | {"prompts": windows[:1, :begin].tolist()})["logits"]
    every = [places] * len(windows)
    types = (torch.float32, torch.float64)
    return theirs, *(torch.stack(logits_at(source, windows, every, dtype)) for dtype in types)


@pytest.mark.parametrize(
    "gains", [[0.0], [0.0] * 16, [0.0] * 32, [-0.0, -2.0], [1e-40, 1e-8], [-1e-6, 1e4]], ids=str
)
def test_biases_are_folded_behind_any_gains(gains):
    config = ModelConfig(**SMALL, **MODELS["neo-16"])
    draw = torch.Generator().manual_seed(1)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        parameter.data = random_value(name, tuple(parameter.shape), draw)
        if name.endswith("ln_1.weight"):
            parameter.data[: len(gains)] = torch.tensor(gains)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tree = write_config(config, None, "float32")
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**tree)).eval()
    state = {one.name: one.make().float() for one in exported(config, values.get, torch.float32)}
    assert theirs.load_state_dict(state, strict=False).unexpected_keys == []
    ids = torch.randint(257, (2, 40), generator=draw)
    with torch.no_grad():
        exact, found = model.double().logits(ids), theirs(ids).logits
    assert float((exact - found).abs().max()) < 4e-6 * float(exact.abs().max())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_gpt3_125m_over_its_full_context(tmp_path):
    """Its shape, its bands and 2,048 tokens; weights as large as initial ones, biases as well."""
    config = PRESETS["gpt3-125m"].model
    weights_folder(tmp_path / "ours", config, std=0.02)
    source = open_weights(tmp_path / "ours")
    row = []
    for dtype, most in ((torch.float32, 4e-6), (torch.bfloat16, 5e-2)):
        out = tmp_path / str(dtype)
        out.mkdir()
        write_export(source, None, out, dtype, 10**9)
        theirs, ours, exact = logits(out, tmp_path / "ours", config.n_ctx - 4)
        largest = float(exact.abs().max())
        pairs = ((theirs, ours), (theirs, exact), (ours, exact))
        row.append([float((a - b).abs().max()) / largest for a, b in pairs])
        assert max(row[-1][:2]) < most
        shutil.rmtree(out)
    (other, off, own), (_, rounded, _) = row
    print(f"\n| GPTNeoForCausalLM (64, GPT-3 125M) | {other:.1e} {off:.1e} {own:.1e} {rounded:.1e}")


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_and_all_comes_back(name, tmp_path):
    config = ModelConfig(**SMALL, **MODELS[name])
    weights_folder(tmp_path / "ours", config, "bytes" if config.family == "gpt2" else "")
    source = open_weights(tmp_path / "ours")
    encoding = source.tokenizer() if config.family == "gpt2" else None
    row = []
    for dtype, most in ((torch.float32, 4e-6), (torch.bfloat16, 5e-2)):
        out = tmp_path / str(dtype)
        out.mkdir()
        write_export(source, encoding, out, dtype, 60_000)
        assert len(list(out.glob("*.safetensors"))) > 1
        theirs, ours, exact = logits(out, tmp_path / "ours")
        largest = float(exact.abs().max())
        other, off, own = (
            float((a - b).abs().max()) / largest
            for a, b in ((theirs, ours), (theirs, exact), (ours, exact))
        )
        row += [other, off, own]
        assert max(off, other) < most
    # A row of the table in docs/how-to/weights.md.
    (kind,) = json.loads((out / "config.json").read_text())["architectures"]
    figures = " | ".join(f"{x:.1e}".replace("e-0", "e-") for x in (*row[:3], row[4]))
    print(f"\n| {kind} ({config.d_head}, {name}) | {figures} |")
    first, again, back, twice = (tmp_path / n for n in ("torch.float32", "again", "in", "in2"))
    import_model(str(first), back)
    again.mkdir()
    write_export(open_weights(back), encoding, again, torch.float32, 60_000)
    import_model(str(again), twice)
    for one, other_folder in ((first, again), (back, twice)):
        names = sorted(p.name for p in one.iterdir())
        assert names == sorted(p.name for p in other_folder.iterdir())
        same, differing, _ = filecmp.cmpfiles(one, other_folder, names, shallow=False)
        assert same == names, differing
    assert main(["checkpoint", "verify", str(back)]) == 0


def test_the_command_writes_a_folder_that_was_checked(tmp_path, capsys):
    config = ModelConfig(**SMALL, **MODELS["neo-80"])
    weights_folder(tmp_path / "ours", config, "bytes")
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "hf"]
    assert main(command) == 0
    assert "20 greedy tokens compared" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "GPTNeoForCausalLM" in card and "flash_attention_2" in card and "random tokens" in card
    assert main(command) == 2
    assert "not empty; give a folder that does not exist yet" in capsys.readouterr().err
    # It comes back with its tokenizer, and writes the same text.
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    texts = []
    for folder in ("ours", "back"):
        capsys.readouterr()
        options = ["--prompt", "Hi", "--temperature", "0", "--max-tokens", "9", "--no-stop"]
        assert main(["generate", str(tmp_path / folder), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("Hi")


def test_an_export_that_computes_something_else_is_found(tmp_path):
    weights_folder(tmp_path / "ours", ModelConfig(**SMALL, **MODELS["gpt2"]), "bytes")
    source = open_weights(tmp_path / "ours")
    encoding = source.tokenizer()
    (tmp_path / "out").mkdir()
    write_export(source, encoding, tmp_path / "out", torch.float32, 10**9)
    file = tmp_path / "out" / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    # A square matrix that is not transposed loads without a word.
    square = "transformer.h.1.attn.c_proj.weight"
    tensors[square] = tensors[square].t().contiguous()
    save_file(tensors, file, {"format": "pt"})
    windows, _ = windows_of(source)
    found = compare(tmp_path / "out", source, windows, encoding, torch.float32)
    assert "logits differ by" in found.problem()
    assert not found.other_texts
    (tmp_path / "out" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(MegagptError, match="transformers cannot open the export"):
        compare(tmp_path / "out", source, windows, encoding, torch.float32)


def test_what_no_class_of_transformers_computes_is_refused(tmp_path):
    for more, key in (
        ({"family": "gpt1", **BANDED}, "model.attention"),
        ({"family": "igpt", **BANDED}, "model.attention"),
        ({"family": "gpt1", "activation": "gelu"}, "model.activation"),
    ):
        folder = tmp_path / f"{key}-{more['family']}"
        weights_folder(folder, ModelConfig(**SMALL, d_model=32, **more))
        with pytest.raises(UsageError, match=f"{key} = .* transformers cannot compute this model"):
            export_model(folder, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_converters_find_every_field_they_read(tmp_path):
    """What llama.cpp's convert_hf_to_gguf.py and vLLM's GPT2LMHeadModel read of a GPT-2 folder."""
    config = ModelConfig(**SMALL, d_model=32)
    weights_folder(tmp_path / "ours", config, "bytes")
    source = open_weights(tmp_path / "ours")
    write_export(source, source.tokenizer(), tmp_path, torch.float32, 10**9)
    tree = json.loads((tmp_path / "config.json").read_text())
    llama = {"n_layer": 3, "n_ctx": 40, "n_embd": 32, "n_head": 2, "layer_norm_epsilon": 1e-5}
    vllm = {
        "vocab_size": 257,
        "n_positions": 40,
        "n_inner": None,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float32",
    }
    assert {key: tree[key] for key in llama | vllm} == llama | vllm
    assert tree["bos_token_id"] == tree["eos_token_id"] == 256
    # Both take these names, and turn the matrices of c_attn, c_proj and c_fc, which lie as (in,
    # out). lm_head is the embedding where it is left out.
    block = {"ln_1": (32,), "ln_2": (32,), "attn.c_attn": (32, 96), "attn.c_proj": (32, 32)}
    block |= {"mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
    wanted = {"wte.weight": (257, 32), "wpe.weight": (40, 32)}
    wanted |= {"ln_f.weight": (32,), "ln_f.bias": (32,)}
    for layer, (name, shape) in product(range(3), block.items()):
        wanted[f"h.{layer}.{name}.weight"], wanted[f"h.{layer}.{name}.bias"] = shape, shape[-1:]
    found = load_file(tmp_path / "model-00001-of-00001.safetensors")
    shapes = {name.removeprefix("transformer."): tuple(v.shape) for name, v in found.items()}
    assert shapes == wanted and all(name.startswith("transformer.") for name in found)
    # llama.cpp's converter: a hash of ids by AutoTokenizer, no id beyond the embedding.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert max(tokenizer.vocab.values()) < tree["vocab_size"]
    assert tokenizer.encode("a b") == [97, 32, 98], "no id is put before or behind a text"


def test_images_go_out_and_come_back_with_their_palette(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    palette = Palette(draw.uniform(-1, 1, (20, 3)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    ids = draw.integers(0, 20, (5, 36))
    prepare("CORPUS", records=ids, vocabulary=palette)  # the name in a folder of weights
    config = ModelConfig(**SMALL | {"n_ctx": 36, "vocab_size": 20}, d_model=32, family="igpt")
    weights_folder(tmp_path / "ours", config, "tokenizer.json", vocabulary=palette.fingerprint)
    (tmp_path / "ours/tokenizer.json").write_text(palette.text)
    found = export_model(tmp_path / "ours", tmp_path / "out")
    assert found.texts == 2 and found.tokens == 18
    card = (tmp_path / "out/README.md").read_text()
    assert "clusters of preprocessor_config.json" in card and "windows of CORPUS" in card
    assert "endoftext" not in card
    import_model(str(tmp_path / "out"), tmp_path / "back")
    assert open_weights(tmp_path / "back").palette().text == palette.text
    assert main(["checkpoint", "verify", str(tmp_path / "back")]) == 0
    # A palette in another order is found by the ids of images.
    tree = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    tree["clusters"].reverse()
    (tmp_path / "out/preprocessor_config.json").write_text(json.dumps(tree))
    source = open_weights(tmp_path / "ours")
    windows, _ = windows_of(source)
    assert (windows[:, 0] == 20).all() and torch.equal(
        windows[0, 1:], torch.from_numpy(ids[0, :-1])
    )
    worse = compare(tmp_path / "out", source, windows, palette, torch.float32)
    assert "its tokenizer files give other ids for 2 of 2" in worse.problem()

"""OpenAI's TensorFlow checkpoints come in bit for bit, and no damage to them is missed."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from megagpt.checkpoint.export import open_weights
from megagpt.errors import DamageError, UsageError
from megagpt.hub.importing import import_model
from megagpt.hub.tensorflow import Bundle
from tests.lib.refusals import refused

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tensorflow"


def make() -> ModuleType:
    """What the fixtures were written by."""
    spec = importlib.util.spec_from_file_location("make", FIXTURE / "make.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_tensorflows_own_files_are_read_bit_for_bit(tmp_path):
    bundle, expected = Bundle(FIXTURE / "gpt2" / "model.ckpt"), make().variables()
    assert bundle.variables.keys() == expected.keys()
    for name, value in expected.items():
        found = bundle.read(name)
        assert found.dtype == value.dtype and np.array_equal(found, value), name
    import_model(str(FIXTURE / "gpt2"), tmp_path / "in")
    weights = open_weights(tmp_path / "in")
    assert weights.config.model.n_ctx == 8 and weights.config.model.vocab_size == 17
    matrix = torch.from_numpy(expected["model/h1/mlp/c_fc/w"][0])
    assert torch.equal(weights.read("h.1.mlp.c_fc.weight"), matrix.t())
    assert torch.equal(weights.read("wte.weight"), torch.from_numpy(expected["model/wte"]))
    assert torch.equal(weights.read("ln_f.bias"), torch.from_numpy(expected["model/ln_f/b"]))


def test_every_damaged_byte_of_them_is_named(tmp_path):
    folder = Path(shutil.copytree(FIXTURE / "gpt2", tmp_path / "gpt2"))
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        content = (folder / name).read_bytes()
        for at in range(len(content)):
            if name.endswith("0001") and at % 17:
                continue
            (folder / name).write_bytes(
                content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
            )
            with pytest.raises(DamageError, match=name):
                bundle = Bundle(folder / "model.ckpt")
                for variable in bundle.variables:
                    bundle.read(variable)
        (folder / name).write_bytes(content[:-100])
        refused(folder, name, DamageError)
        (folder / name).write_bytes(content)
    (folder / "model.ckpt.data-00000-of-00001").unlink()
    refused(folder, "data-00000-of-00001: cannot be read", DamageError)
    shutil.copy(folder / "model.ckpt.index", folder / "other.index")
    refused(folder, "holds 2 files ..index; must be one checkpoint's")


# --- Image GPT -----------------------------------------------------------------------------------


def image_gpt(values: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits (B, n_ctx, K) of images (B, n_ctx) by the equations of openai/image-gpt's model.py, in
    float64: logits at p are of pixel p."""
    v = {name.removeprefix("model/"): value.astype(np.float64) for name, value in values.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return v[f"{name}/g"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    start = np.broadcast_to(v["sos"], (len(ids), 1, len(v["sos"])))
    x = np.concatenate([start, v["wte"][ids[:, :-1]]], 1) + v["wpe"]
    seen = np.tril(np.ones((ids.shape[1], ids.shape[1])))
    for layer in ("h0", "h1"):
        a = norm(x, f"{layer}/ln_1")
        q, k, w = (np.einsum("bsf,hef->bhse", a, v[f"{layer}/attn/{c}_proj"]) for c in "qkv")
        scores = np.einsum("bhse,bhte->bhst", q, k) / np.sqrt(q.shape[-1])
        scores = np.exp(np.where(seen, scores, -np.inf))
        mixed = np.einsum("bhst,bhte->bhse", scores / scores.sum(-1, keepdims=True), w)
        x = x + np.einsum("bhse,hef->bsf", mixed, v[f"{layer}/attn/c_proj"])
        m = norm(x, f"{layer}/ln_2") @ v[f"{layer}/mlp/c_fc/w"][0]
        x = x + (m / (1 + np.exp(-1.702 * m))) @ v[f"{layer}/mlp/c_proj/w"][0]
    return norm(x, "ln_f") @ v["wtet"].T


def test_image_gpts_own_files_compute_what_its_code_does(tmp_path):
    folder, expected = FIXTURE / "igpt", make().image_variables()
    assert len(list(folder.glob("*.data-*"))) == 2, "as in the releases, in several shards"
    bundle = Bundle(folder / "model.ckpt-1000")
    assert bundle.variables.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(bundle.read(name), value), name
    import_model(str(folder), tmp_path / "in")
    weights = open_weights(tmp_path / "in")
    assert weights.config.model.start_token == 6 and weights.palette() is None
    assert torch.equal(weights.read("wte.weight")[6], torch.from_numpy(expected["model/sos"]))
    ids = np.random.default_rng(1).integers(0, 6, (3, 16))
    read = torch.from_numpy(np.c_[np.full(3, 6), ids[:, :-1]])
    with torch.no_grad():
        found = weights.model(dtype=torch.float64).logits(read).numpy()
    assert np.abs(found - image_gpt(expected, ids)).max() < 1e-12


def test_openais_palette_comes_along(tmp_path):
    colours = np.random.default_rng(2).uniform(-1, 1, (6, 3)).astype(np.float32)
    folder = Path(shutil.copytree(FIXTURE / "igpt", tmp_path / "igpt"))
    np.save(folder / "kmeans_centers.npy", colours)
    import_model(str(folder), tmp_path / "in")
    assert np.array_equal(open_weights(tmp_path / "in").palette().colours, colours)
    np.save(tmp_path / "mine.npy", colours[:5])
    with pytest.raises(UsageError, match="mine.npy: a palette of 5 colours, but the model has 6"):
        import_model(str(folder), tmp_path / "other", str(tmp_path / "mine.npy"))
    (folder / "preprocessor_config.json").write_text("{}")
    refused(folder, "preprocessor_config.json: holds no clusters of colours", DamageError)
    for path in folder.glob("model*"):
        path.unlink()
    shutil.copytree(FIXTURE / "gpt2", folder, dirs_exist_ok=True)
    (folder / "hparams.json").unlink()
    refused(folder, "no checkpoint of OpenAI's Image GPT .*hparams.json")

"""nanoGPT's ckpt.pt comes in exactly, and whatever torch.save wrote is refused by what is wrong."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.checkpoint.export import open_weights
from megagpt.errors import DamageError, MegagptError, UsageError
from megagpt.hub.foreign_model import saved_by_torch
from megagpt.hub.importing import import_model
from megagpt.hub.tensorflow import Bundle
from tests.lib.foreign import SIZES, same_logits, theirs
from tests.lib.refusals import refused


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
    refused(tmp_path, "model_args has 'use_relu', which nanoGPT's own")
    torch.save({"model": {}}, path)
    refused(path, "no ckpt.pt of nanoGPT .'model_args' is missing")
    torch.save({"model": Bundle}, path)
    refused(path, "holds more than tensors and plain values")
    torch.save({"model": {3: torch.zeros(1)}, "model_args": {"block_size": 1}}, path)
    refused(path, "ckpt.pt: has the key 3, which names no tensor")
    nano(path, True, dropout=None)
    refused(path, "resid_pdrop = None: must be a number")
    nano(path, True)
    tree = torch.load(path)
    tree["model"]["_orig_mod.transformer.wte.weight"] = "x"
    torch.save(tree, path)
    refused(path, "transformer.wte.weight is str: must be a tensor")
    torch.save([1], path)
    refused(path, "holds list, not a table of tensors")
    path.write_bytes(b"no zip")
    refused(path, "ckpt.pt", (UsageError, DamageError))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_byte_of_a_pickle_ends_in_a_message(zipped, tmp_path):
    path, draw = tmp_path / "a.bin", random.Random(0)
    state = {f"h.{i}.w": torch.arange(12.0).reshape(3, 4) for i in range(3)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), 0
    for trial in range(300):
        content = bytearray(whole)
        if trial % 3 == 0:
            content = content[: draw.randrange(len(content))]
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        for stand_in in (None, Bundle):
            try:
                saved_by_torch(path, stand_in)
            except MegagptError as error:
                assert str(error).startswith(f"{path}: "), trial
                refused += 1
    assert refused > 200

"""OpenAI's own files of GPT-1, GPT-2 and Image GPT, opened under transformers' names (L3)."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megagpt.errors import DamageError, UsageError
from megagpt.hub.foreign_model import ForeignModel, json_object

if TYPE_CHECKING:
    from megagpt.hub.tensorflow import Bundle


def openai_gpt2(folder: Path) -> ForeignModel:
    """TensorFlow's checkpoint of GPT-2, as OpenAI released it."""
    bundle = _bundle(folder)
    sizes = json_object(folder / "hparams.json")
    config = {"model_type": "gpt2", "vocab_size": sizes.pop("n_vocab", None)}
    config["n_positions"] = sizes.pop("n_ctx", None)
    original = {_gpt2_name(name): name for name in bundle.variables}

    def read(name: str) -> Tensor:
        value = torch.from_numpy(bundle.read(original[name]).copy())
        return value.squeeze(0) if value.ndim == 3 else value

    return ForeignModel(path=folder, config=config | sizes, names=frozenset(original), read=read)


def _bundle(folder: Path) -> "Bundle":
    """The one checkpoint of TensorFlow's in a folder."""
    from megagpt.hub.tensorflow import Bundle

    prefixes = sorted(folder.glob("*.index"))
    if len(prefixes) != 1:
        raise UsageError(f"{folder}: holds {len(prefixes)} files *.index; must be one checkpoint's")
    return Bundle(prefixes[0].with_suffix(""))


def _gpt2_name(name: str) -> str:
    """model/h0/attn/c_attn/w -> transformer.h.0.attn.c_attn.weight."""
    *stem, last = name.removeprefix("model/").split("/")
    leaf = {"w": "weight", "g": "weight", "b": "bias"}.get(last, f"{last}.weight")
    return "transformer." + re.sub(r"^h(\d)", r"h.\1", ".".join([*stem, leaf]))


# --- Image GPT -----------------------------------------------------------------------------------


def openai_image_gpt(folder: Path) -> ForeignModel:
    """TensorFlow's checkpoint of Image GPT, as OpenAI released it: no other file tells its sizes.

    Its q, k, v and c_proj are (heads, d_head, D) and multiply as bsf,hef->bhse and bhse,hef->bsf;
    the start vector (sos) and the output matrix (wtet) stand by themselves.
    """
    bundle = _bundle(folder)
    shapes = {name: one.shape for name, one in bundle.variables.items()}
    try:
        (k, d), (n_ctx, _) = shapes["model/wte"], shapes["model/wpe"]
        heads = shapes["model/h0/attn/q_proj"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(
            f"{bundle.path}: no checkpoint of OpenAI's Image GPT ({error}); one of GPT-2 has its "
            "hparams.json beside it"
        ) from None
    layers = {name.split("/")[1] for name in shapes if re.match(r"model/h\d+/", name)}
    parts = _image_gpt_parts(set(shapes))

    def read(name: str) -> Tensor:
        tensors = [torch.from_numpy(bundle.read(one).copy()) for one in parts[name]]
        if name.endswith(".c_attn.weight"):  # (H, E, D) is (out, in)
            return torch.cat([one.reshape(d, d) for one in tensors]).t()
        if name.endswith(".attn.c_proj.weight"):  # (H, E, D) is (in, out)
            return tensors[0].reshape(d, d)
        if name.endswith(".wte.weight"):
            return torch.cat([tensors[0], tensors[1][None]])
        return tensors[0].squeeze(0) if tensors[0].ndim == 3 else tensors[0]

    config = {"model_type": "imagegpt", "n_layer": len(layers), "n_head": heads, "n_embd": d}
    config |= {"n_positions": n_ctx, "vocab_size": k + 1}
    return ForeignModel(path=folder, config=config, names=frozenset(parts), read=read)


def _image_gpt_parts(names: set[str]) -> dict[str, list[str]]:
    """transformers' name -> the variables that make it up; what belongs to none under its own."""
    parts: dict[str, list[str]] = {}
    for name in sorted(names):
        ours, at = _gpt2_name(name), 0
        if name in ("model/wte", "model/sos"):
            ours, at = "transformer.wte.weight", int(name.endswith("sos"))
        elif name == "model/wtet":
            ours = "lm_head.weight"
        elif found := re.search(r"/attn/([qkv])_proj$", name):
            ours = _gpt2_name(name.replace(found[0], "/attn/c_attn"))
            at = "qkv".index(found[1])
        parts.setdefault(ours, []).insert(at, name)
    return parts


# --- GPT-1 ---------------------------------------------------------------------------------------


def openai_gpt1(folder: Path) -> ForeignModel:
    """GPT-1's numpy files: one long vector in ten parts, and the shapes of what lies in it."""
    try:
        shapes = json.loads((folder / "params_shapes.json").read_text(encoding="utf-8"))
        parts = sorted(folder.glob("params_*.npy"), key=lambda p: int(p.stem[len("params_") :]))
        flat = np.concatenate([np.load(part, allow_pickle=False) for part in parts])
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        if ends[-1] != flat.size:
            raise ValueError(f"its shapes tell of {ends[-1]} numbers, its files hold {flat.size}")
        if len(shapes) % 12 != 2 or min(map(len, shapes)) < 1 or min(map(min, shapes)) < 1:
            raise ValueError("its shapes are not those of two embeddings and 12 tensors a layer")
        n_ctx, d_model = shapes[0]
        flats = zip(np.split(flat, ends[:-1]), shapes, strict=True)
        values = [value.reshape(shape[-2:]) for value, shape in flats]
    except Exception as error:  # numpy's headers have many errors
        raise DamageError(
            f"{folder}: not OpenAI's files of GPT-1 ({error}); copy them again"
        ) from None
    # Matrices have a first dimension of 1.
    tensors = {
        name: torch.from_numpy(value)
        for name, value in zip(_gpt1_names(len(shapes)), values, strict=True)
    }
    return ForeignModel(
        path=folder,
        config={
            "model_type": "openai-gpt",
            "n_layer": (len(shapes) - 2) // 12,
            # The files do not say it; every head of the paper's is 64 wide.
            "n_head": d_model // 64,
            "n_embd": d_model,
            "n_positions": n_ctx,
            "vocab_size": shapes[1][0],
        },
        names=frozenset(tensors),
        read=lambda name: tensors[name],
    )


def _gpt1_names(count: int) -> list[str]:
    """transformers' names in the order of OpenAI's files."""
    leaves = ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    names = ["transformer.positions_embed.weight", "transformer.tokens_embed.weight"]
    for layer in range((count - 2) // 12):
        names += [f"transformer.h.{layer}.{x}.{k}" for x in leaves for k in ("weight", "bias")]
    return names

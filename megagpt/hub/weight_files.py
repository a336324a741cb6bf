"""What others' models lie in: files and folders, opened as names and tensors (L3).

Every form is brought to the names of transformers, with a `config` as its config.json says it;
naming.py does the rest.
"""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.errors import DamageError, UsageError
from megagpt.hub.shapes import NANOGPT

log = logging.getLogger(__name__)

FORMS = (
    "a folder of transformers (config.json with *.safetensors or pytorch_model*.bin), of OpenAI's "
    "GPT-2 (hparams.json with model.ckpt.*) or GPT-1 (params_shapes.json with params_*.npy), "
    "nanoGPT's ckpt.pt, or the name of a repository of the Hugging Face hub"
)
WANTED = (["*.json", "*.txt", "*.safetensors"], ["*.bin"])
"""Files of a repository of the hub that are fetched; the last where there are no safetensors."""


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A model as others keep it."""

    path: Path
    config: dict[str, Any]
    """As a config.json of transformers says it; model_type may be NANOGPT."""
    names: frozenset[str]
    read: Callable[[str], Tensor]
    """Name -> tensor as it is stored."""

    def fp32(self, name: str) -> Tensor:
        """A tensor in fp32. Raises UsageError for one of whole numbers, which is quantised."""
        found = self.read(name)
        if not found.is_floating_point():
            raise UsageError(f"{self.path}: {name} is of {found.dtype}: must be of a float type")
        return found.float()


def open_foreign(path: str) -> ForeignModel:
    """The model at `path`: one of FORMS.

    Raises UsageError for anything else, DamageError for a file that is not what its format says.
    """
    folder = Path(path)
    if not folder.exists():
        folder = _from_hub(path)
    if folder.is_file():
        return _nanogpt(folder)
    for file, opened in (
        ("config.json", _transformers),
        ("hparams.json", _openai_gpt2),
        ("params_shapes.json", _openai_gpt1),
    ):
        if (folder / file).exists():
            return opened(folder)
    if (folder / "ckpt.pt").exists():
        return _nanogpt(folder / "ckpt.pt")
    raise UsageError(f"{folder}: nothing here that can be imported; give {FORMS}")


def _from_hub(name: str) -> Path:
    """The newest snapshot of a repository, from the local cache or the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"{name}: is not there; give {FORMS}")
    try:
        folder = Path(snapshot_download(name, allow_patterns=WANTED[0]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=WANTED[1])
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{name}: no file or folder here, and no repository that the Hugging Face hub gives "
            f"({reason}); give {FORMS}"
        ) from None


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DamageError when there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamageError(f"{path}: not readable as JSON ({error}); copy it again") from None
    if not isinstance(tree, dict):
        raise DamageError(f"{path}: not a JSON object; copy it again")
    return tree


# --- transformers -------------------------------------------------------------------------------


def _transformers(folder: Path) -> ForeignModel:
    """A folder that save_pretrained wrote, or a snapshot of the hub."""
    config, files = _object(folder / "config.json"), _file_of(folder)

    @cache
    def pickled(file: str) -> dict[str, Any]:
        return _pickled(folder / file)

    def read(name: str) -> Tensor:
        file = files[name]
        try:
            if file.endswith(".bin"):
                return pickled(file)[name]
            with safe_open(folder / file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (OSError, KeyError, SafetensorError) as error:
            why = f"{name} is not readable ({error})"
            raise DamageError(f"{folder / file}: {why}; copy the file again") from None

    return ForeignModel(path=folder, config=config, names=frozenset(files), read=read)


def _file_of(folder: Path) -> dict[str, str]:
    """Name of a tensor -> its file, by the index or the only file."""
    files: dict[str, str] = {}
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if not files and (folder / index).exists():
            files = _object(folder / index).get("weight_map", {})
    for single in ("model.safetensors", "pytorch_model.bin"):
        if not files and (folder / single).exists():
            files = dict.fromkeys(_names(folder / single), single)
    if not files:
        raise UsageError(
            f"{folder}: holds no model.safetensors or pytorch_model.bin, whole or in shards"
        )
    for file in set(files.values()):
        if Path(file).name != file:
            raise DamageError(f"{folder}: its index names {file!r}, which is no file of the folder")
    return files


def _names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(_pickled(path))
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise DamageError(f"{path}: not readable ({error}); copy it again") from None


def _pickled(path: Path) -> dict[str, Any]:
    """What torch.save wrote, mapped where its format allows it. Nothing in it is executed."""
    try:
        # Files of before 2020 are no zip: they are read whole.
        mapped = zipfile.is_zipfile(path)
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path}: holds more than tensors and plain values, and would have to execute code to "
            "be read; save its state_dict as safetensors where you trust it"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise DamageError(f"{path}: not readable ({reason}); copy it again") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: holds {type(tree).__name__}, not a table of tensors")
    return tree


# --- nanoGPT ------------------------------------------------------------------------------------


def _nanogpt(path: Path) -> ForeignModel:
    """ckpt.pt, as nanoGPT's train.py saves it: {"model", "model_args", ...}."""
    tree = _pickled(path)
    try:
        state, args = tree["model"], dict(tree["model_args"])
        args["n_positions"] = args.pop("block_size")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: no ckpt.pt of nanoGPT ({error} is missing)") from None
    known = {"n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "dropout", "bias"}
    for key in sorted(set(args) - known):
        raise UsageError(f"{path}: model_args has {key!r}, which nanoGPT's own model has not")
    return ForeignModel(
        path=path,
        config={"model_type": NANOGPT, **args},
        names=frozenset(state),
        read=lambda name: state[name],
    )


# --- OpenAI -------------------------------------------------------------------------------------


def _openai_gpt2(folder: Path) -> ForeignModel:
    """TensorFlow's checkpoint of GPT-2, as OpenAI released it."""
    from megagpt.hub.tensorflow import Bundle

    prefixes = sorted(folder.glob("*.index"))
    if len(prefixes) != 1:
        raise UsageError(f"{folder}: holds {len(prefixes)} files *.index; must be one checkpoint's")
    bundle = Bundle(prefixes[0].with_suffix(""))
    sizes = _object(folder / "hparams.json")
    config = {"model_type": "gpt2", "vocab_size": sizes.pop("n_vocab", None)}
    config["n_positions"] = sizes.pop("n_ctx", None)
    original = {_gpt2_name(name): name for name in bundle.variables}

    def read(name: str) -> Tensor:
        value = torch.from_numpy(bundle.read(original[name]).copy())
        return value.squeeze(0) if value.ndim == 3 else value

    return ForeignModel(path=folder, config=config | sizes, names=frozenset(original), read=read)


def _gpt2_name(name: str) -> str:
    """model/h0/attn/c_attn/w -> transformer.h.0.attn.c_attn.weight."""
    *stem, last = name.removeprefix("model/").split("/")
    leaf = {"w": "weight", "g": "weight", "b": "bias"}.get(last, f"{last}.weight")
    return "transformer." + re.sub(r"^h(\d)", r"h.\1", ".".join([*stem, leaf]))


def _openai_gpt1(folder: Path) -> ForeignModel:
    """GPT-1's numpy files: one long vector in ten parts, and the shapes of what lies in it."""
    try:
        shapes = json.loads((folder / "params_shapes.json").read_text(encoding="utf-8"))
        parts = sorted(folder.glob("params_*.npy"), key=lambda p: int(p.stem[len("params_") :]))
        flat = np.concatenate([np.load(part, allow_pickle=False) for part in parts])
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        if ends[-1] != flat.size:
            raise ValueError(f"its shapes tell of {ends[-1]} numbers, its files hold {flat.size}")
        values = np.split(flat, ends[:-1])
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise DamageError(
            f"{folder}: not OpenAI's files of GPT-1 ({error}); copy them again"
        ) from (None)
    tensors = {
        name: torch.from_numpy(value.reshape(shape)).squeeze(0)
        if len(shape) == 3
        else torch.from_numpy(value.reshape(shape))
        for name, value, shape in zip(_gpt1_names(len(shapes)), values, shapes, strict=True)
    }
    n_ctx, d_model = shapes[0]
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

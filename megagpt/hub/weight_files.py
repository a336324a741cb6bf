"""What others' models lie in: files and folders, opened as names and tensors (L3).

Every form is brought to the names of transformers, with a `config` as its config.json says it;
naming.py does the rest.
"""

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.errors import DamageError, UsageError
from megagpt.hub.foreign_model import ForeignModel, json_object, saved_by_torch, table
from megagpt.hub.megatron import FILE, megatron_file, open_megatron
from megagpt.hub.openai_files import openai_gpt1, openai_gpt2, openai_image_gpt
from megagpt.hub.shapes import NANOGPT

log = logging.getLogger(__name__)

FORMS = (
    "a folder of transformers (config.json with *.safetensors or pytorch_model*.bin), of OpenAI's "
    "GPT-2 (hparams.json with model.ckpt.*), Image GPT (model.ckpt-*.index) or GPT-1 "
    "(params_shapes.json with params_*.npy), nanoGPT's ckpt.pt, Megatron-LM's model_optim_rng.pt, "
    "or the name of a repository of the Hugging Face hub"
)
WANTED = (["*.json", "*.txt", "*.safetensors"], ["*.bin"])
"""Files of a repository of the hub that are fetched; the last where there are no safetensors."""


def open_foreign(path: str) -> ForeignModel:
    """The model at `path`: one of FORMS.

    Raises UsageError for anything else, DamageError for a file that is not what its format says.
    """
    folder = Path(path)
    if not folder.exists():
        folder = _from_hub(path)
    if folder.suffix in (".safetensors", ".bin", ".json") and folder.is_file():
        folder = folder.parent  # a file of a folder of transformers
    if folder.is_file():
        return open_megatron(folder) if folder.name == FILE else _nanogpt(folder)
    for file, opened in (
        ("config.json", _transformers),
        ("hparams.json", openai_gpt2),
        ("params_shapes.json", openai_gpt1),
    ):
        if (folder / file).exists():
            return opened(folder)
    if (folder / "ckpt.pt").exists():
        return _nanogpt(folder / "ckpt.pt")
    if found := megatron_file(folder):
        return open_megatron(found)
    if any(folder.glob("*.index")):
        return openai_image_gpt(folder)
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


# --- transformers -------------------------------------------------------------------------------


def _transformers(folder: Path) -> ForeignModel:
    """A folder that save_pretrained wrote, or a snapshot of the hub."""
    config, files = json_object(folder / "config.json"), _file_of(folder)

    @cache
    def pickled(file: str) -> dict[str, Any]:
        return table(saved_by_torch(folder / file), folder / file)

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
            files = json_object(folder / index).get("weight_map") or {}
    for single in ("model.safetensors", "pytorch_model.bin"):
        if not files and (folder / single).exists():
            files = dict.fromkeys(_names(folder / single), single)
    if not files:
        raise UsageError(
            f"{folder}: holds no model.safetensors or pytorch_model.bin, whole or in shards"
        )
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise DamageError(f"{folder}: its index names {file!r}, which is no file of the folder")
    return files


def _names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(table(saved_by_torch(path), path))
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise DamageError(f"{path}: not readable ({error}); copy it again") from None


# --- nanoGPT ------------------------------------------------------------------------------------


def _nanogpt(path: Path) -> ForeignModel:
    """ckpt.pt, as nanoGPT's train.py saves it: {"model", "model_args", ...}."""
    tree = table(saved_by_torch(path), path)
    try:
        state, args = table(tree["model"], path), dict(tree["model_args"])
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

"""From a run folder to a model on one process, whatever layout trained it (L2)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors import SafetensorError, safe_open

from megagpt.checkpoint import record as manifests
from megagpt.checkpoint.slice_file import SliceReader, fit_rows
from megagpt.config import load_run
from megagpt.errors import DamageError, UsageError
from megagpt.model import GPT
from megagpt.tokenizer import load_tokenizer

INDEX = "model.safetensors.index.json"
"""Names the file of each parameter in a folder of consolidated weights."""


def newest(run: Path) -> Path:
    """Folder of the newest checkpoint of a run folder, or `run` itself if it is a checkpoint.

    Raises UsageError when there is none, DamageError when it is damaged (every byte is read).
    """
    folders = [run] if (run / manifests.MANIFEST).exists() else manifests.list_checkpoints(run)
    if not folders:
        raise UsageError(
            f"{run}: no checkpoint here; give a run folder (the `output` of a run file) that was "
            "trained and saved"
        )
    problems = manifests.verify(folders[-1])
    if problems:
        raise DamageError("; ".join(problems) + "; give the folder of another checkpoint")
    return folders[-1]


def load_model(run: Path, device: str = "cpu") -> tuple[GPT, tiktoken.Encoding, dict[str, Any]]:
    """(model in fp32 and eval mode, its tokenizer, facts: checkpoint, step, tokens, tokenizer).

    `run` is a run folder, one of its checkpoints, or a folder of consolidated weights.
    """
    run = Path(run)
    folder, read, facts = _consolidated(run) if (run / INDEX).exists() else _slices(newest(run))
    model = GPT(load_run(folder / "config.toml").model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fit_rows(read(name), parameter.shape, name))
    encoding = load_tokenizer(facts["tokenizer"])
    return model.to(device).eval(), encoding, {"checkpoint": folder, **facts}


Weights = tuple[Path, Callable[[str], torch.Tensor], dict[str, Any]]
"""(folder, canonical name -> whole parameter in fp32, facts)."""


def _slices(folder: Path) -> Weights:
    manifest = manifests.read_manifest(folder)
    facts = {
        "step": manifest.step,
        "tokens": manifest.tokens,
        "tokenizer": manifest.data["tokenizer"],
    }
    return folder, SliceReader(folder).full, facts


def _consolidated(folder: Path) -> Weights:
    """Raises DamageError for a file that is missing or not readable."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        places = index["weight_map"]
        files = {name: safe_open(folder / name, framework="pt") for name in set(places.values())}
        facts = {key: index["metadata"][key] for key in ("step", "tokens", "tokenizer")}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DamageError(
            f"{folder}: not readable as consolidated weights ({error}); write them again with "
            "megagpt checkpoint consolidate"
        ) from None
    return folder, lambda name: files[places[name]].get_tensor(name), facts

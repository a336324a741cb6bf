"""One set of safetensors files with canonical names, from any layout's checkpoint (L2).

The files are those that Hugging Face's tools write for a large model: `model-00001-of-00002
.safetensors` and an index that maps names to files; a reader needs nothing of megagpt.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megagpt.checkpoint import record as manifests
from megagpt.checkpoint.model import INDEX, newest
from megagpt.checkpoint.slice_file import SliceReader, fit_rows
from megagpt.config import dump_run, load_run
from megagpt.errors import UsageError


def consolidate(run: Path, output: Path, shard_bytes: int = 5_000_000_000) -> list[Path]:
    """Writes fp32 weights of the newest checkpoint of `run` into `output`; returns the files.

    The same files whatever layout saved the checkpoint. Memory: one shard. Raises UsageError when
    `output` holds something already, DamageError when the checkpoint is damaged.
    """
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output}: not empty; give a folder that does not exist yet")
    source = newest(run)
    reader = SliceReader(source)
    temporary = output.with_name(output.name + manifests.TEMPORARY)
    # One that was killed may have left some.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = load_run(source / "config.toml")
    rows = config.model.embedding_rows
    groups = list(_groups(reader, shard_bytes))
    names: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors: dict[str, Tensor] = {n: _whole(reader, n, rows) for n in group}
        save_file(tensors, temporary / name, metadata={"format": "pt"})
        names.update(dict.fromkeys(group, name))
        total += sum(4 * tensor.numel() for tensor in tensors.values())
    state = manifests.read_manifest(source)
    facts = {"step": state.step, "tokens": state.tokens, "tokenizer": state.data["tokenizer"]}
    index = {"metadata": {"total_size": total, **facts}, "weight_map": names}
    manifests.write_file(temporary / INDEX, json.dumps(index, indent=1) + "\n")
    manifests.write_file(temporary / "config.toml", dump_run(config))
    if output.exists():
        output.rmdir()
    os.replace(temporary, output)
    return sorted(output.iterdir())


def _whole(reader: SliceReader, name: str, rows: int) -> Tensor:
    """The parameter without the padding that the layout of the run added to it."""
    whole = reader.full(name)
    if name == "wte.weight":
        whole = fit_rows(whole, (rows, *whole.shape[1:]), name)
    return whole.contiguous()


def _groups(reader: SliceReader, shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, as many as fit into one file; a larger tensor has a file of its own."""
    group: list[str] = []
    size = 0
    for name in reader.names:
        own = torch.float32.itemsize * reader.numel(name)
        if group and size + own > shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    yield group

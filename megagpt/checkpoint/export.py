"""What else is made of a checkpoint: a model on one process, weights for others, another cut (L2).

Consolidated weights are the files that Hugging Face's tools write for a large model:
`model-00001-of-00002.safetensors` and an index that maps names to files; a reader needs nothing of
megagpt. No layout needs a reshape, since training reads any cut by itself; it is for moving a
checkpoint: the thousand files of a cluster into the one file of a workstation, or back.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megagpt.checkpoint import record
from megagpt.checkpoint.load import slice_problems, tell_strangers
from megagpt.checkpoint.record import CONFIG
from megagpt.checkpoint.slice_file import SliceReader, file_name, fit_rows, write_slices
from megagpt.config import dump_run, load_run
from megagpt.engine.slices import Slice
from megagpt.errors import DamageError, UsageError
from megagpt.files import temporary_of, write_file
from megagpt.model import GPT
from megagpt.tokenizer import load_tokenizer

INDEX = "model.safetensors.index.json"
"""Names the file of each parameter in a folder of consolidated weights."""


def newest(run: Path) -> Path:
    """Folder of the newest checkpoint of a run folder, or `run` itself if it is a checkpoint.

    Raises UsageError when there is none, DamageError when it is damaged (every byte is read).
    """
    folder = record.checkpoints_of(run)[-1]
    problems = record.files_problems(folder)
    if problems := problems or slice_problems(folder, load_run(folder / CONFIG).model):
        raise DamageError("; ".join(problems) + "; give the folder of another checkpoint")
    tell_strangers(folder)
    return folder


def _facts(folder: Path) -> dict[str, Any]:
    """What is told of a checkpoint's weights wherever they go."""
    saved = record.read_record(folder)
    return {"step": saved.step, "tokens": saved.tokens, "tokenizer": saved.data["tokenizer"]}


# --- a model ------------------------------------------------------------------------------------


def load_model(run: Path, device: str = "cpu") -> tuple[GPT, tiktoken.Encoding, dict[str, Any]]:
    """(model in fp32 and eval mode, its tokenizer, facts: checkpoint, step, tokens, tokenizer).

    `run` is a run folder, one of its checkpoints, or a folder of consolidated weights.
    """
    folder = Path(run)
    if (folder / INDEX).exists():
        read, facts = _consolidated(folder)
    else:
        folder = newest(folder)
        read, facts = SliceReader(folder).full, _facts(folder)
    model = GPT(load_run(folder / CONFIG).model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fit_rows(read(name), parameter.shape, name))
    encoding = load_tokenizer(facts["tokenizer"])
    return model.to(device).eval(), encoding, {"checkpoint": folder, **facts}


def _consolidated(folder: Path) -> tuple[Callable[[str], Tensor], dict[str, Any]]:
    """(canonical name -> whole parameter in fp32, facts). Raises DamageError for a file that is
    missing or not readable."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        file_of = index["weight_map"]
        files = {name: safe_open(folder / name, framework="pt") for name in set(file_of.values())}
        facts = {key: index["metadata"][key] for key in ("step", "tokens", "tokenizer")}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DamageError(
            f"{folder}: not readable as consolidated weights ({error}); write them again with "
            "megagpt checkpoint consolidate"
        ) from None
    return lambda name: files[file_of[name]].get_tensor(name), facts


# --- consolidated weights -----------------------------------------------------------------------


def consolidate(run: Path, output: Path, shard_bytes: int = 5_000_000_000) -> list[Path]:
    """Writes fp32 weights of the newest checkpoint of `run` into `output`; returns the files.

    The same files whatever layout saved the checkpoint. Memory: one shard. Raises UsageError when
    `output` holds something already, DamageError when the checkpoint is damaged.
    """
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output}: not empty; give a folder that does not exist yet")
    source = newest(run)
    reader, config = SliceReader(source), load_run(source / CONFIG)
    groups = list(_groups(reader, shard_bytes))
    file_of: dict[str, str] = {}
    total = 0
    with record.written_whole(output, temporary_of(output)) as temporary:
        for number, group in enumerate(groups, 1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = {name: _unpadded(reader, name, config.model.embedding_rows) for name in group}
            save_file(tensors, temporary / file, metadata={"format": "pt"})
            file_of |= dict.fromkeys(group, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total, **_facts(source)}, "weight_map": file_of}
        write_file(temporary / INDEX, json.dumps(index, indent=1) + "\n")
        write_file(temporary / CONFIG, dump_run(config))
    return sorted(output.iterdir())


def _unpadded(reader: SliceReader, name: str, rows: int) -> Tensor:
    """The parameter without the padding that the layout of the run added to it."""
    whole = reader.full(name)
    if name == "wte.weight":
        whole = fit_rows(whole, (rows, *whole.shape[1:]), name)
    return whole.contiguous()


def _groups(reader: SliceReader, shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, as many as fit into one file; a larger tensor has a file to itself."""
    group: list[str] = []
    size = 0
    for name in reader.names:
        tensor_bytes = torch.float32.itemsize * reader.numel(name)
        if group and size + tensor_bytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor_bytes
    yield group


# --- another cut --------------------------------------------------------------------------------


def reshape(run: Path, output: Path, ranks: int = 1) -> Path:
    """Writes the newest checkpoint of `run` into the run folder `output`: the same state, without
    tensor split, cut for `ranks` ranks.

    Memory: one parameter. Returns the new checkpoint's folder. Raises UsageError when it is there
    already or `ranks` is below 1, DamageError when the checkpoint is damaged.
    """
    if ranks < 1:
        raise UsageError(f"--ranks {ranks}: must be 1 or more")
    source = newest(run)
    saved, reader = record.read_record(source), SliceReader(source)
    folder = record.folder_of(output) / record.name_of(saved.step)
    if folder.exists():
        raise UsageError(f"{folder}: is there already; give another run folder")
    layout = {"world": ranks, "pipeline": 1, "tensor": 1}
    with record.written_whole(folder, record.unfinished_of(folder)) as temporary:
        files = [
            write_slices(temporary / file_name(rank), _cut(reader, rank, ranks))
            for rank in range(ranks)
        ]
        shutil.copyfile(source / CONFIG, temporary / CONFIG)
        record.seal(temporary, dataclasses.replace(saved, layout=layout), files)
    record.name_latest(folder)
    return folder


def _cut(reader: SliceReader, rank: int, ranks: int) -> Iterator[Slice]:
    """An equal stretch of every parameter, read when it is written."""
    for name in reader.names:
        size = reader.numel(name)
        start, end = size * rank // ranks, size * (rank + 1) // ranks
        if start < end:
            yield reader.slice(name, start, end - start)

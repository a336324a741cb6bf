"""What else is made of a checkpoint: a model on one process, weights for others, another cut (L2).

Consolidated weights are the files that Hugging Face's tools write for a large model:
`model-00001-of-00002.safetensors` and an index that maps names to files; a reader needs nothing of
megagpt. The index carries a checksum of every file and of itself. No layout needs a reshape, since
training reads any cut by itself; it is for moving a checkpoint: the thousand files of a cluster
into the one file of a workstation, or back.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megagpt.checkpoint import record
from megagpt.checkpoint.load import slice_problems, tell_strangers, vocabulary_of
from megagpt.checkpoint.record import CONFIG, FileRecord, read_sealed
from megagpt.checkpoint.slice_file import SliceReader, file_name, fit_rows, write_slices
from megagpt.config import dump_run, load_run
from megagpt.engine.slices import Slice
from megagpt.errors import DamageError, MegagptError, UsageError
from megagpt.files import sealed_json, temporary_of, write_durably, write_file
from megagpt.model import GPT
from megagpt.tokenizer import fingerprint
from megagpt.tokenizer.portable import FILE, described

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
"""Names the file of each parameter in a folder of consolidated weights."""
FACTS = ("step", "tokens", "tokenizer", "vocabulary")
"""What its metadata tell of the model beside what describes the files."""
ORIENTATION = (
    "weights of attn.c_attn, attn.c_proj, mlp.c_fc and mlp.c_proj are (out, in), as in "
    "torch.nn.Linear; in GPT-2's own files (Conv1D) they are (in, out): transpose these four"
)
"""Said in the files: a square weight that is loaded transposed goes unnoticed."""
UNSEALED = {"metadata": {"total_size", "step", "tokens", "tokenizer"}, "weight_map": None}
"""The keys of an index of November 2026 or before, which carries no checksum."""
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What an index of another shape raises."""
WRITE_AGAIN = "write the weights again with megagpt checkpoint consolidate"


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
    told = {"tokenizer": "", "vocabulary": ""} | saved.data
    return {"step": saved.step, "tokens": saved.tokens} | {key: told[key] for key in FACTS[2:]}


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
    encoding = vocabulary_of(folder, facts)
    told = {key: facts[key] for key in ("step", "tokens", "tokenizer")}
    return model.to(device).eval(), encoding, {"checkpoint": folder, **told}


def _consolidated(folder: Path) -> tuple[Callable[[str], Tensor], dict[str, Any]]:
    """(canonical name -> whole parameter in fp32, facts). Raises DamageError for a file that is
    missing, damaged or not readable."""
    if problems := consolidated_problems(folder):
        raise DamageError("; ".join(problems) + f"; {WRITE_AGAIN}")
    index = _index(folder)
    file_of, metadata = index["weight_map"], {"vocabulary": ""} | index["metadata"]
    if "sha256" not in index:
        log.warning("%s: of an earlier megagpt, without checksums; %s", folder, WRITE_AGAIN)

    def read(name: str) -> Tensor:
        try:
            with safe_open(folder / file_of[name], framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, KeyError, SafetensorError) as error:
            raise DamageError(f"{folder}: no parameter {name} ({error}); {WRITE_AGAIN}") from None

    return read, {key: metadata[key] for key in FACTS}


def consolidated_problems(folder: Path) -> list[str]:
    """What is wrong with a folder of consolidated weights, reading every byte; empty when whole."""
    try:
        index = _index(folder)
        files = [FileRecord(**file) for file in index["metadata"].get("files", ())]
        unknown = {*index["weight_map"].values()} - {file.name for file in files}
        if unknown and "sha256" in index:
            raise ValueError(f"no checksum of {', '.join(sorted(unknown))}")
        return [problem for file in files if (problem := file.problem(folder))]
    except BROKEN as error:
        return [f"{folder / INDEX}: not readable as consolidated weights ({error})"]


def consolidated_strangers(folder: Path) -> list[str]:
    """What lies in a folder of whole consolidated weights and is read by nothing."""
    index = _index(folder)
    files = [FileRecord(**file) for file in index["metadata"].get("files", ())]
    return record.strangers(folder, files, INDEX) if files else []


def _index(folder: Path) -> dict[str, Any]:
    """The index of consolidated weights. Raises one of BROKEN for what is none."""
    content = (folder / INDEX).read_bytes()
    tree: dict[str, Any] = json.loads(content)
    if tree.keys() != UNSEALED.keys() or tree["metadata"].keys() != UNSEALED["metadata"]:
        tree = read_sealed(content)
    for name in tree["weight_map"].values():
        FileRecord(name, 0, "")  # raises for a name that leads out of the folder
    facts = tree["metadata"]
    if [type(facts[key]) for key in ("step", "tokens", "tokenizer")] != [int, int, str]:
        raise ValueError("its metadata tells no step, tokens and tokenizer")
    return tree


# --- consolidated weights -----------------------------------------------------------------------


def consolidate(run: Path, output: Path, shard_bytes: int = 5_000_000_000) -> list[Path]:
    """Writes fp32 weights of the newest checkpoint of `run` into `output`; returns the files.

    The same files whatever layout saved the checkpoint. Memory: one shard. Raises UsageError when
    `output` holds something already, DamageError when the checkpoint is damaged.
    """
    folder = output.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{output}: not empty; give a folder that does not exist yet")
    source = newest(run)
    reader, config = SliceReader(source), load_run(source / CONFIG)
    facts, layout = _facts(source), {"format": "pt", "orientation": ORIENTATION}
    groups = list(_groups(reader, shard_bytes))
    file_of: dict[str, str] = {}
    total = 0
    with record.written_whole(folder, temporary_of(folder)) as temporary:
        for number, group in enumerate(groups, 1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = {name: _unpadded(reader, name, config.model.embedding_rows) for name in group}
            save_file(tensors, temporary / file, metadata=layout)
            file_of |= dict.fromkeys(group, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
        write_file(temporary / CONFIG, dump_run(config))
        facts["vocabulary"] = _take_vocabulary(source, facts, temporary)
        files = [asdict(FileRecord.of(path)) for path in sorted(temporary.iterdir())]
        metadata = {"total_size": total, **facts, "orientation": ORIENTATION, "files": files}
        index = {"metadata": metadata, "weight_map": file_of}
        write_file(temporary / INDEX, sealed_json(index))
    return [output / path.name for path in sorted(folder.iterdir())]


def _take_vocabulary(source: Path, facts: dict[str, Any], folder: Path) -> str:
    """Writes the checkpoint's tokenizer into `folder`; its fingerprint, "" where none is known."""
    try:
        encoding = vocabulary_of(source, facts)
    except MegagptError as error:
        if (source / FILE).exists() and facts["vocabulary"]:
            raise
        log.warning("the weights will not carry their tokenizer: %s", error)
        return ""
    carried = facts["vocabulary"] and (source / FILE).exists()
    content = (source / FILE).read_bytes() if carried else described(encoding).encode()
    write_durably(folder / FILE, content)
    return fingerprint(encoding)


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
        for name in {CONFIG, FILE} & {file.name for file in saved.files}:
            shutil.copyfile(source / name, temporary / name)
        record.seal(temporary, replace(saved, layout=layout), files)
    record.name_latest(folder)
    return folder


def _cut(reader: SliceReader, rank: int, ranks: int) -> Iterator[Slice]:
    """An equal stretch of every parameter, read when it is written."""
    for name in reader.names:
        size = reader.numel(name)
        start, end = size * rank // ranks, size * (rank + 1) // ranks
        if start < end:
            yield reader.slice(name, start, end - start)

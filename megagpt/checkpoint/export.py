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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.checkpoint import record
from megagpt.checkpoint.load import examined, shapes_of, tell_strangers, vocabulary_of
from megagpt.checkpoint.record import CONFIG, FileRecord, read_sealed
from megagpt.checkpoint.slice_file import SliceReader, file_name, fit_rows, write_slices
from megagpt.checkpoint.slice_index import index_of_packed, packed
from megagpt.checkpoint.weights import SHARD_BYTES, PlannedTensor, write_tensors
from megagpt.config import RunConfig, dump_run, load_run
from megagpt.engine.slices import Slice
from megagpt.errors import DamageError, MegagptError, UsageError
from megagpt.files import file_sha256, sealed_json, temporary_of, write_durably, write_file
from megagpt.model import GPT, LayerClasses
from megagpt.tokenizer import fingerprint
from megagpt.tokenizer.palette import Palette, holds_palette, read_palette
from megagpt.tokenizer.portable import FILE, described

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=torch.nn.Module)
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
    if problems := examined(folder).problems:
        raise DamageError("; ".join(problems) + "; give the folder of another checkpoint")
    tell_strangers(folder)
    return folder


def _facts(folder: Path) -> dict[str, Any]:
    """What is told of a checkpoint's weights wherever they go."""
    saved = record.read_record(folder)
    told = {"tokenizer": "", "vocabulary": ""} | saved.data
    return {"step": saved.step, "tokens": saved.tokens} | {key: told[key] for key in FACTS[2:]}


# --- a model ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's weights, wherever they lie."""

    folder: Path
    """The checkpoint, or the folder of weights."""
    config: RunConfig
    """What they were trained with; of imported ones only `config.model` means something."""
    facts: dict[str, Any]
    """FACTS; tokenizer and vocabulary are "" where they are not known."""
    read: Callable[[str], Tensor]
    """Canonical name -> whole parameter in fp32, perhaps with padding."""

    def whole(self, name: str, shape: Sequence[int]) -> Tensor:
        """A parameter with as much padding as `shape` has."""
        return fit_rows(self.read(name), shape, name)

    def tokenizer(self) -> tiktoken.Encoding:
        """The tokenizer that goes with them. Raises UsageError for imported weights without one,
        and what vocabulary_of raises."""
        if not self.facts["tokenizer"]:
            raise UsageError(
                f"{self.folder}: the tokenizer of these weights is not known, so there is no text "
                "to be read or written; import them again with --tokenizer. Weights of a run on "
                "ids that stand for no text have none"
            )
        return vocabulary_of(self.folder, self.facts)

    def palette(self) -> Palette | None:
        """The palette that goes with weights of images; None where none is known. Raises
        DamageError for another than they were trained with."""
        path = self.folder / FILE
        return read_palette(path, self.facts["vocabulary"]) if holds_palette(path) else None

    def model(
        self,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        classes: LayerClasses = LayerClasses(),  # noqa: B008 (frozen)
    ) -> GPT:
        """The model in eval mode. Weights are rounded to `dtype` one by one on their way to the
        device, so that a host needs the memory of the largest alone."""
        with torch.device("meta"):
            model = GPT(self.config.model, classes).to(dtype)
        return filled(model, device, self.whole)

    def told(self) -> dict[str, Any]:
        """Where they lie, and what is told of them: checkpoint, step, tokens, tokenizer."""
        known = {key: self.facts[key] for key in ("step", "tokens", "tokenizer")}
        return {"checkpoint": self.folder, **known}

    @property
    def digest(self) -> str:
        """sha256 of the file that holds every other file's."""
        index = self.folder / INDEX
        return file_sha256(index if index.exists() else self.folder / record.MANIFEST)


@torch.no_grad()
def filled(model: Module, device: str, value: Callable[[str, Sequence[int]], Tensor]) -> Module:
    """A module of the meta device on another, in eval mode: `value` gives each parameter by its
    name and shape, in any dtype."""
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.copy_(value(name, parameter.shape).to(parameter.dtype))
    return model.eval()


def open_weights(run: Path, compare: bool = True) -> Weights:
    """The weights of a run folder's newest checkpoint, of one checkpoint, or of a folder of
    consolidated or imported weights, after every byte was compared with its checksum.

    compare: False where that was done a moment ago. Raises UsageError for none, DamageError for
    damaged ones.
    """
    folder = Path(run)
    if (folder / "config.json").exists() and not (folder / CONFIG).exists():
        raise UsageError(
            f"{folder}: holds a model as transformers writes it; `megagpt import {folder} OUT` "
            "makes weights of it that are read here"
        )
    if (folder / INDEX).exists():
        read, facts = _consolidated(folder, compare)
    else:
        folder = newest(folder) if compare else record.checkpoints_of(folder)[-1]
        read, facts = SliceReader(folder).full, _facts(folder)
    return Weights(folder=folder, config=load_run(folder / CONFIG), facts=facts, read=read)


def load_model(
    run: Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    classes: LayerClasses = LayerClasses(),  # noqa: B008 (frozen)
) -> tuple[GPT, tiktoken.Encoding, dict[str, Any]]:
    """(model in eval mode, its tokenizer, facts: checkpoint, step, tokens, tokenizer).

    `run` is what open_weights takes.
    """
    weights = open_weights(run)
    encoding = weights.tokenizer()
    return weights.model(device, dtype, classes), encoding, weights.told()


def _consolidated(folder: Path, compare: bool) -> tuple[Callable[[str], Tensor], dict[str, Any]]:
    """(canonical name -> whole parameter in fp32, facts). Raises DamageError for a file that is
    missing, damaged or not readable."""
    if compare and (problems := consolidated_state(folder)[0]):
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


def consolidated_state(folder: Path) -> tuple[list[str], list[str]]:
    """(what is wrong with a folder of consolidated weights, reading every byte; what lies there and
    is read by nothing)."""
    try:
        index = _index(folder)
        files = [FileRecord(**file) for file in index["metadata"].get("files", ())]
        unknown = {*index["weight_map"].values()} - {file.name for file in files}
        if unknown and "sha256" in index:
            raise ValueError(f"no checksum of {', '.join(sorted(unknown))}")
        problems = [problem for file in files if (problem := file.problem(folder))]
        return problems, record.strangers(folder, files, INDEX) if files else []
    except BROKEN as error:
        return [f"{folder / INDEX}: not readable as consolidated weights ({error})"], []


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


def consolidate(run: Path, output: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes fp32 weights of the newest checkpoint of `run` into `output`; returns the files.

    The same files whatever layout saved the checkpoint. Memory: one parameter. Raises UsageError
    when `output` holds something already, DamageError when the checkpoint is damaged.
    """
    folder = new_folder(output)
    source = newest(run)
    weights = open_weights(source, compare=False)
    tensors = [
        # Without the padding that the layout of the run added.
        PlannedTensor(name, shape, partial(weights.whole, name, shape))
        for name, shape in sorted(shapes_of(weights.config.model).items())
    ]
    with record.written_whole(folder, temporary_of(folder)) as temporary:
        vocabulary = _take_vocabulary(source, weights.facts, temporary)
        facts = weights.facts | {"vocabulary": vocabulary}
        write_weights(temporary, tensors, weights.config, facts, shard_bytes)
    return [output / path.name for path in sorted(folder.iterdir())]


def new_folder(output: Path) -> Path:
    """`output` as an absolute path. Raises UsageError when something is there already."""
    folder = output.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{output}: not empty; give a folder that does not exist yet")
    return folder


def write_weights(
    folder: Path,
    tensors: Iterable[PlannedTensor],
    config: RunConfig,
    facts: dict[str, Any],
    shard_bytes: int,
) -> None:
    """Writes weights in fp32, one tensor in memory, and the index with the checksum of every file
    that lies in the folder then."""
    planned = list(tensors)
    layout = {"format": "pt", "orientation": ORIENTATION}
    file_of = write_tensors(folder, planned, torch.float32, shard_bytes, layout)
    write_file(folder / CONFIG, dump_run(config))
    total = sum(torch.float32.itemsize * prod(one.shape) for one in planned)
    files = [asdict(FileRecord.of(path)) for path in sorted(folder.iterdir())]
    metadata = {"total_size": total, **facts, "orientation": ORIENTATION, "files": files}
    write_file(folder / INDEX, sealed_json({"metadata": metadata, "weight_map": file_of}))


def _take_vocabulary(source: Path, facts: dict[str, Any], folder: Path) -> str:
    """Writes the checkpoint's tokenizer into `folder`; its fingerprint, "" where none is known."""
    if holds_palette(source / FILE):
        write_durably(folder / FILE, (source / FILE).read_bytes())
        return read_palette(folder / FILE, facts["vocabulary"]).fingerprint
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
        files, held = [], []
        for rank in range(ranks):
            files.append(write_slices(temporary / file_name(rank), _cut(reader, rank, ranks)))
            held.append(packed(_cut(reader, rank, ranks)))
        write_file(temporary / record.INDEX, index_of_packed(held))
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

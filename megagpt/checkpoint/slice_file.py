"""A rank's file in a checkpoint: slices of fp32 tensors in the safetensors format (L2).

The writer streams, so that saving needs no second copy of the tensors, and hashes what it writes;
the reader assembles any stretch of any parameter of all ranks, whose files it opens when they are
needed, and reads no more of them than it needs. What lies where slices.json tells (slice_index.py).

Files are read here, not mapped as safetensors' own get_slice does: that took 192 MB of address
space for a checkpoint of 153 MB, so that a process with a limit of its own could not open one that
is larger, and a file that was cut short while it was open ended the process (SIGBUS) unnamed.
"""

import errno
import io
import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.record import INDEX, FileRecord, read_record
from megagpt.checkpoint.slice_index import (
    Layout,
    Parameters,
    Stretch,
    facts_of,
    parse_index,
    taken_in,
    told,
)
from megagpt.checkpoint.weights import PlannedTensor, write_safetensors
from megagpt.engine import split as splits
from megagpt.engine.slices import STATES, Slice, TensorShare
from megagpt.errors import DamageError, UsageError

PADDED = ("wte.weight", "head.weight")
"""Parameters whose rows are tokens: their padding depends on the layout, is zero and stays zero."""
MOST_OPEN = 32
"""Files of a checkpoint that are open at once."""
MOST_PROBLEMS = 5
"""Parameters that are named when slices are not those of the model."""
NO_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing about a file."""
SLICES = re.compile(r"rank_[0-9]{5,}\.safetensors")
"""Names of the files of ranks."""


def file_name(rank: int) -> str:
    """Name of a rank's file in a checkpoint's folder."""
    return f"rank_{rank:05d}.safetensors"


def rank_of(name: str) -> int:
    """The rank of such a name."""
    return int(name.removeprefix("rank_").removesuffix(".safetensors"))


def write_slices(path: Path, slices: Iterable[Slice]) -> FileRecord:
    """Writes the owned slices to `path`, flushed to the disk. Raises OSError, ENOSPC included."""
    owned = [piece for piece in slices if piece.owned]
    tensors = [
        PlannedTensor(f"{piece.name}|{key}", (piece.numel,), partial(piece.read, key))
        for piece in owned
        for key in STATES
    ]
    sha256 = write_safetensors(
        path, tensors, torch.float32, {"slices": json.dumps(facts_of(owned))}
    )
    return FileRecord(path.name, path.stat().st_size, sha256)


# --- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Header:
    """What a rank's file says that it holds."""

    slices: dict[str, Any]
    """Name -> facts, as facts_of gives them."""
    offsets: dict[str, tuple[int, ...]]
    """Name -> where each key of STATES begins, in bytes from the beginning of the file."""


class _Files:
    """Files of slices, few of them open at a time: a checkpoint of a thousand ranks has as many
    files as a process may open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[int, io.BufferedReader] = OrderedDict()
        self._headers: dict[int, _Header] = {}

    def opened(self, rank: int) -> io.BufferedReader:
        """The file, which may be closed when another one is asked for. Raises OSError."""
        if rank in self._open:
            self._open.move_to_end(rank)
        else:
            while len(self._open) >= MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[rank] = (self.folder / file_name(rank)).open("rb")
        return self._open[rank]

    def header(self, rank: int) -> _Header:
        """The file's header. Raises DamageError when it is not ours, OSError for want of files or
        memory."""
        if rank not in self._headers:
            try:
                self._headers[rank] = _header(self.opened(rank))
            except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in NO_DAMAGE:
                    raise
                raise _unreadable(self.folder / file_name(rank), error) from None
        return self._headers[rank]

    def read(self, name: str, stretch: Stretch, key: str, first: int, out: Tensor) -> None:
        """Fills `out`, contiguous fp32, with the elements of a stretch from `first` on."""
        path, header = self.folder / file_name(stretch.rank), self.header(stretch.rank)
        facts = header.slices.get(name)
        if facts is None or stretch != told(stretch.rank, facts)[1]:
            raise DamageError(f"{path}: {_otherwise(name)}; use another checkpoint")
        file = self.opened(stretch.rank)
        file.seek(header.offsets[name][STATES.index(key)] + 4 * (first - stretch.start))
        target = out.numpy().data.cast("B")
        if file.readinto(target) < len(target):
            raise DamageError(
                f"{path}: has become shorter since it was opened; use another checkpoint"
            )


def _header(file: io.BufferedReader) -> _Header:
    """Reads a header. Raises OSError, KeyError and the like when it is not ours."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if 8 + length > size:
        raise ValueError("its header is longer than the file")
    tensors: dict[str, Any] = json.loads(file.read(length))
    slices: dict[str, Any] = json.loads(tensors.pop("__metadata__")["slices"])
    end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, but its header says {8 + length + end}")
    offsets = {}
    for name, facts in slices.items():
        places = [tensors[f"{name}|{key}"]["data_offsets"] for key in STATES]
        for key, (begin, end) in zip(STATES, places, strict=True):
            if end - begin != 4 * facts["numel"]:
                raise ValueError(f"{name}|{key} has {end - begin} bytes, not 4 an element")
        offsets[name] = tuple(8 + length + begin for begin, _ in places)
    return _Header(slices, offsets)


def _otherwise(name: str) -> str:
    return f"does not hold of {name!r} what {INDEX} says"


def _unreadable(path: Path, error: Exception) -> DamageError:
    return DamageError(
        f"{path}: not a readable file of slices ({error}); run megagpt checkpoint "
        "verify, and use another checkpoint"
    )


class SliceReader:
    """All slices of a checkpoint, whatever layout wrote them; a file is opened when something of it
    is read. `parameters` tells what lies where.

    Raises DamageError for a file that is missing or not a safetensors file of ours, and when what
    is read lies in no file.
    """

    def __init__(self, folder: Path, index: str | None = None) -> None:
        """index: the content of the checkpoint's index, where it is known already. Where there is
        none, the headers of all files that the manifest names tell what there is."""
        self.folder = folder
        self._files = _Files(folder)
        if index is None:
            names = [file.name for file in read_record(folder).files]
            if INDEX not in names:
                self.parameters = self._of_headers([n for n in names if SLICES.fullmatch(n)])
                return
            index = (folder / INDEX).read_bytes().decode(errors="replace")
        self.parameters = self._of_index(index)

    def _of_index(self, text: str) -> Parameters:
        try:
            return parse_index(text)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise _unreadable(self.folder / INDEX, error) from None

    def _of_headers(self, names: Sequence[str]) -> Parameters:
        found: Parameters = {}
        for rank in map(rank_of, names):
            slices = self._files.header(rank).slices
            try:
                taken_in(found, rank, slices)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise _unreadable(self.folder / file_name(rank), error) from None
        if not names:
            raise DamageError(
                f"{self.folder}: its manifest names no rank_*.safetensors; use another checkpoint"
            )
        return found

    def differences(self, ranks: Sequence[int]) -> list[str]:
        """Which files of these ranks hold something else than the index tells."""
        expected: dict[int, dict[str, tuple[Layout, Stretch]]] = {rank: {} for rank in ranks}
        for name, held in self.parameters.items():
            for stretch in held.stretches:
                if stretch.rank in expected:
                    expected[stretch.rank][name] = (held.layout, stretch)
        problems = []
        for rank in ranks:
            slices = self._files.header(rank).slices
            there = {name: told(rank, facts) for name, facts in slices.items()}
            names = sorted({*there, *expected[rank]})
            if other := [n for n in names if there.get(n) != expected[rank].get(n)]:
                problems.append(f"{self.folder / file_name(rank)}: {_otherwise(other[0])}")
        return problems

    @property
    def files(self) -> set[str]:
        """Names of the files that hold something, by the index or by their headers."""
        held = self.parameters.values()
        return {file_name(rank) for rank in {s.rank for one in held for s in one.stretches}}

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters, sorted."""
        return sorted(self.parameters)

    def numel(self, name: str) -> int:
        """Elements of a whole parameter."""
        return math.prod(self.parameters[name].whole_shape)

    def problems(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Why the slices are not those of a model with parameters of these shapes, each element
        once: a sentence for each parameter, the first few of them; empty when they are."""
        found = {}
        for name in sorted({*shapes, *self.parameters}):
            if name not in self.parameters:
                found[name] = "is in no file"
            elif name not in shapes:
                found[name] = "is none of the model's"
            elif not _fits(self.parameters[name].whole_shape, shapes[name], name):
                there = self.parameters[name].whole_shape
                found[name] = f"has shape {there}, but {tuple(shapes[name])} in the model"
            elif problem := self.parameters[name].problem():
                found[name] = f"is not there once: {problem}"
        lines = [f"{self.folder}: parameter {name!r} {why}" for name, why in found.items()]
        more = len(lines) - MOST_PROBLEMS
        return lines if more <= 0 else [*lines[:MOST_PROBLEMS], f"and {more} parameters more"]

    def slice(self, name: str, start: int, numel: int) -> Slice:
        """Elements [start, start + numel) of a whole parameter, read when asked for."""
        piece = Slice(
            name=name,
            shape=self.parameters[name].whole_shape,
            split=TensorShare(),
            start=start,
            numel=numel,
            owned=True,
            read=lambda key: self.read(piece, key),
            write=_read_only,
        )
        return piece

    def full(self, name: str, key: str = "fp32") -> Tensor:
        """A whole parameter, or one of its moments, in fp32."""
        if name not in self.parameters:
            raise DamageError(
                f"{self.folder}: holds no parameter {name!r}; it belongs to another model"
            )
        shape, kind, parts = self.parameters[name].layout
        numel = math.prod(shape)
        shards = [self._part(name, p, key, 0, numel).view(shape) for p in range(parts)]
        return splits.join(shards, kind)

    def read(self, piece: Slice, key: str) -> Tensor:
        """The elements of a slice of any layout: (numel,) fp32.

        Reads no more than the slice where the tensor split is that of the checkpoint; otherwise
        the whole parameter, one at a time. Raises UsageError when the model has another shape.
        """
        kind, part, parts = piece.split.kind, piece.split.part, piece.split.parts
        known = self.parameters.get(piece.name)
        if known is not None and known.layout == (piece.shape, kind, parts):
            return self._part(piece.name, part, key, piece.start, piece.numel)
        shape = splits.whole_shape(piece.shape, kind, parts)
        fitted = fit_rows(self.full(piece.name, key), shape, piece.name)
        whole = splits.take(fitted, kind, part, parts)
        return whole.reshape(-1)[piece.start : piece.start + piece.numel]

    def _part(self, name: str, part: int, key: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of one tensor-parallel part, flattened."""
        out = torch.empty(numel, dtype=torch.float32)
        done = start
        for stretch in self.parameters[name].of_part(part):
            last = min(start + numel, stretch.end)
            # In order of their starts, so a stretch that starts later leaves a gap.
            if stretch.start <= done < last:
                self._files.read(name, stretch, key, done, out[done - start : last - start])
                done = last
        if done != start + numel:
            raise DamageError(
                f"{self.folder}: parameter {name!r} ({key}) is not whole: element {done} of part "
                f"{part} is in no file; use another checkpoint"
            )
        return out


def _read_only(key: str, value: Tensor) -> None:
    raise NotImplementedError("a checkpoint's slices are not written to")


def _fits(stored: Sequence[int], wanted: Sequence[int], name: str) -> bool:
    """Whether two shapes of a parameter differ in padding at most."""
    if name in PADDED:
        return tuple(stored[1:]) == tuple(wanted[1:])
    return tuple(stored) == tuple(wanted)


def fit_rows(whole: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """The parameter `name` with as many rows as `shape` has, padding cut or added.

    Raises UsageError when it differs from `shape` in more than padding.
    """
    if tuple(whole.shape) == tuple(shape):
        return whole
    if not _fits(whole.shape, shape, name):
        raise UsageError(
            f"parameter {name!r} has shape {tuple(whole.shape)} in the checkpoint, but "
            f"{tuple(shape)} in the model; a checkpoint opens only with the [model] it was "
            "trained with"
        )
    rows = min(shape[0], whole.shape[0])
    filled = whole.new_zeros(*shape)
    filled[:rows] = whole[:rows]
    return filled

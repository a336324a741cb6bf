"""A rank's file in a checkpoint: slices of fp32 tensors in the safetensors format (L2).

The writer streams, so that saving needs no second copy of the tensors, and hashes what it writes;
the reader assembles any stretch of any parameter of all ranks, whose files it opens when they are
needed, and reads no more of them than it needs.

Files are read here, not mapped as safetensors' own get_slice does: that took 192 MB of address
space for a checkpoint of 153 MB, so that a process with a limit of its own could not open one that
is larger, and a file that was cut short while it was open ended the process (SIGBUS) unnamed.
"""

import errno
import io
import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.record import FileRecord, read_record
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


def file_name(rank: int) -> str:
    """Name of a rank's file in a checkpoint's folder."""
    return f"rank_{rank:05d}.safetensors"


NO_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing about a file."""
SLICES = re.compile(r"rank_[0-9]+\.safetensors")
"""Names of such files."""


def write_slices(path: Path, slices: Iterable[Slice]) -> FileRecord:
    """Writes the owned slices to `path`, flushed to the disk. Raises OSError, ENOSPC included."""
    owned = [piece for piece in slices if piece.owned]
    facts = {
        piece.name: {
            "shape": piece.shape,
            "start": piece.start,
            "numel": piece.numel,
            "kind": piece.split.kind,
            "part": piece.split.part,
            "parts": piece.split.parts,
        }
        for piece in owned
    }
    tensors = [
        PlannedTensor(f"{piece.name}|{key}", (piece.numel,), partial(piece.read, key))
        for piece in owned
        for key in STATES
    ]
    sha256 = write_safetensors(path, tensors, torch.float32, {"slices": json.dumps(facts)})
    return FileRecord(path.name, path.stat().st_size, sha256)


# --- reading ------------------------------------------------------------------------------------


class _Files:
    """Files that are open for reading, few of them at a time: a checkpoint of a thousand ranks has
    as many files as a process may open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, io.BufferedReader] = OrderedDict()

    def opened(self, path: Path) -> io.BufferedReader:
        """The file, which may be closed when another one is asked for. Raises OSError."""
        if path in self._open:
            self._open.move_to_end(path)
        else:
            while len(self._open) >= MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[path] = path.open("rb")
        return self._open[path]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Elements [start, end) of one tensor-parallel part of a parameter, in a file."""

    path: Path
    files: "_Files"
    offsets: dict[str, int]
    """Where each key's first element lies, in bytes from the beginning of the file."""
    part: int
    start: int
    end: int

    def read(self, key: str, first: int, out: Tensor) -> None:
        """Fills `out`, contiguous fp32, with the elements from `first` on."""
        file = self.files.opened(self.path)
        file.seek(self.offsets[key] + 4 * (first - self.start))
        target = out.numpy().data.cast("B")
        if file.readinto(target) < len(target):
            raise DamageError(
                f"{self.path}: has become shorter since it was opened; use another checkpoint"
            )


@dataclass(frozen=True, slots=True)
class _Parameter:
    """What a checkpoint holds of one parameter."""

    shape: tuple[int, ...]
    """Of one tensor-parallel part."""
    kind: str
    parts: int
    stretches: list[_Stretch] = field(default_factory=list)

    @property
    def layout(self) -> tuple[tuple[int, ...], str, int]:
        return self.shape, self.kind, self.parts

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return splits.whole_shape(*self.layout)

    def of_part(self, part: int) -> list[_Stretch]:
        """The stretches of one part, in order of their starts."""
        return sorted((s for s in self.stretches if s.part == part), key=lambda s: s.start)

    def problem(self) -> str:
        """Why the stretches do not hold each element exactly once; "" when they do."""
        numel = math.prod(self.shape)
        for part in range(self.parts):
            done = 0
            borders = [(stretch.start, stretch.end) for stretch in self.of_part(part)]
            for start, end in [*borders, (numel, numel)]:
                if start != done:
                    files = "no file" if start > done else "two files"
                    return f"element {min(start, done)} of part {part} is in {files}"
                done = end
        return ""


class SliceReader:
    """All slices of a checkpoint, whatever layout wrote them.

    Raises DamageError for a file that is missing or not a safetensors file of ours, and when what
    is read lies in no file.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """names: the files to read; None: those of the manifest, whatever else lies there."""
        self.folder = folder
        self._parameters: dict[str, _Parameter] = {}
        self._files = _Files()
        if names is None:
            names = [file.name for file in read_record(folder).files if SLICES.fullmatch(file.name)]
        for path in (folder / name for name in names):
            try:
                self._open(path)
            except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in NO_DAMAGE:
                    raise
                raise DamageError(
                    f"{path}: not a readable file of slices ({error}); run megagpt checkpoint "
                    "verify, and use another checkpoint"
                ) from None
        if not names:
            raise DamageError(
                f"{folder}: its manifest names no rank_*.safetensors; use another checkpoint"
            )

    def _open(self, path: Path) -> None:
        """Takes in a rank's header. Raises OSError, KeyError and the like when it is not ours."""
        size = path.stat().st_size
        file = self._files.opened(path)
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError("its header is longer than the file")
        tensors: dict[str, Any] = json.loads(file.read(length))
        slices = json.loads(tensors.pop("__metadata__")["slices"])
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, but its header says {8 + length + end}")
        for name, facts in slices.items():
            offsets = {}
            for key in STATES:
                begin, end = tensors[f"{name}|{key}"]["data_offsets"]
                if end - begin != 4 * facts["numel"]:
                    raise ValueError(f"{name}|{key} has {end - begin} bytes, not 4 an element")
                offsets[key] = 8 + length + begin
            start, last = facts["start"], facts["start"] + facts["numel"]
            layout = (tuple(facts["shape"]), facts["kind"], facts["parts"])
            known = self._parameters.setdefault(name, _Parameter(*layout))
            if known.layout != layout:
                raise ValueError(f"{name} has another shape or split than in another rank's file")
            known.stretches.append(_Stretch(path, self._files, offsets, facts["part"], start, last))

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters, sorted."""
        return sorted(self._parameters)

    def numel(self, name: str) -> int:
        """Elements of a whole parameter."""
        return math.prod(self._parameters[name].whole_shape)

    def problems(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Why the slices are not those of a model with parameters of these shapes, each element
        once: a sentence for each parameter, the first few of them; empty when they are."""
        found = {}
        for name in sorted({*shapes, *self._parameters}):
            if name not in self._parameters:
                found[name] = "is in no file"
            elif name not in shapes:
                found[name] = "is none of the model's"
            elif not _fits(self._parameters[name].whole_shape, shapes[name], name):
                there = self._parameters[name].whole_shape
                found[name] = f"has shape {there}, but {tuple(shapes[name])} in the model"
            elif problem := self._parameters[name].problem():
                found[name] = f"is not there once: {problem}"
        lines = [f"{self.folder}: parameter {name!r} {why}" for name, why in found.items()]
        more = len(lines) - MOST_PROBLEMS
        return lines if more <= 0 else [*lines[:MOST_PROBLEMS], f"and {more} parameters more"]

    def slice(self, name: str, start: int, numel: int) -> Slice:
        """Elements [start, start + numel) of a whole parameter, read when asked for."""
        piece = Slice(
            name=name,
            shape=self._parameters[name].whole_shape,
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
        if name not in self._parameters:
            raise DamageError(
                f"{self.folder}: holds no parameter {name!r}; it belongs to another model"
            )
        known = self._parameters[name]
        numel = math.prod(known.shape)
        shards = [self._part(name, p, key, 0, numel).view(known.shape) for p in range(known.parts)]
        return splits.join(shards, known.kind)

    def read(self, piece: Slice, key: str) -> Tensor:
        """The elements of a slice of any layout: (numel,) fp32.

        Reads no more than the slice where the tensor split is that of the checkpoint; otherwise
        the whole parameter, one at a time. Raises UsageError when the model has another shape.
        """
        kind, part, parts = piece.split.kind, piece.split.part, piece.split.parts
        known = self._parameters.get(piece.name)
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
        for stretch in self._parameters[name].of_part(part):
            last = min(start + numel, stretch.end)
            # In order of their starts, so a stretch that starts later leaves a gap.
            if stretch.start <= done < last:
                stretch.read(key, done, out[done - start : last - start])
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

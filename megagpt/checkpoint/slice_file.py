"""A rank's file in a checkpoint: slices of fp32 tensors in the safetensors format (L2).

The writer streams, so that saving needs no second copy of the tensors, and hashes what it writes;
the reader opens all ranks' files at once and assembles any stretch of any parameter, reading no
more than it needs. It reads, and maps nothing into memory: a process that may use little can
open a checkpoint of any size.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.engine import split as splits
from megagpt.engine.slices import STATES, Slice, TensorShare
from megagpt.errors import DamageError, UsageError


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of one file."""

    name: str
    bytes: int
    sha256: str


def write_slices(path: Path, slices: Iterable[Slice]) -> FileRecord:
    """Writes the owned slices to `path`, flushed to the disk. Raises OSError, ENOSPC included."""
    owned = [one for one in slices if one.owned]
    header: dict[str, object] = {"__metadata__": {"slices": json.dumps(_describe(owned))}}
    offset = 0
    for one in owned:
        for key in STATES:
            end = offset + 4 * one.numel
            offsets = [offset, end]
            header[f"{one.name}|{key}"] = dict(dtype="F32", shape=[one.numel], data_offsets=offsets)
            offset = end
    head = json.dumps(header).encode()
    # The format wants the data aligned to 8 bytes; trailing spaces belong to the header.
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (len(head).to_bytes(8, "little"), head):
            digest.update(chunk)
            file.write(chunk)
        for one in owned:
            for key in STATES:
                data = one.read(key).detach().to("cpu", torch.float32).contiguous().numpy().data
                digest.update(data)
                file.write(data)
                # Or it would be there still while the next is read.
                del data
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, path.stat().st_size, digest.hexdigest())


def _describe(owned: list[Slice]) -> dict[str, object]:
    return {
        one.name: {
            "shape": one.shape,
            "start": one.start,
            "numel": one.numel,
            "kind": one.split.kind,
            "part": one.split.part,
            "parts": one.split.parts,
        }
        for one in owned
    }


class _File:
    """One rank's file, opened. Raises OSError, ValueError or KeyError when it is not ours."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        self._file = path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        if 8 + length > size:
            raise ValueError("its header is longer than the file")
        header = json.loads(self._file.read(length))
        self.slices: dict[str, Any] = json.loads(header.pop("__metadata__")["slices"])
        self._starts = {n: 8 + length + t["data_offsets"][0] for n, t in header.items()}
        end = max((t["data_offsets"][1] for t in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, but its header says {8 + length + end}")

    def read(self, name: str, first: int, out: Tensor) -> None:
        """Fills `out`, contiguous fp32, with the tensor's elements from `first` on."""
        self._file.seek(self._starts[name] + 4 * first)
        left = out.numpy().data.cast("B")
        # The system reads at most 2 GB at a time.
        while left:
            done = self._file.readinto(left)
            if not done:
                raise DamageError(
                    f"{self._file.name}: has become shorter since it was opened; use another "
                    "checkpoint"
                )
            left = left[done:]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a stretch of one tensor-parallel part of a parameter lies."""

    file: int
    start: int
    numel: int


class SliceReader:
    """All slices of a checkpoint, whatever layout wrote them.

    Raises DamageError for a file that is missing or not a safetensors file of ours, and when the
    slices of a parameter do not cover it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[_File] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, tuple[str, int]] = {}
        self._pieces: dict[tuple[str, int], list[_Piece]] = {}
        for number, path in enumerate(sorted(folder.glob("rank_*.safetensors"))):
            try:
                file = _File(path)
            except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
                raise DamageError(
                    f"{path}: not a readable file of slices ({error}); run megagpt checkpoint "
                    "verify, and use another checkpoint"
                ) from None
            self._files.append(file)
            for name, facts in file.slices.items():
                self._shapes[name] = tuple(facts["shape"])
                self._kinds[name] = (facts["kind"], facts["parts"])
                pieces = self._pieces.setdefault((name, facts["part"]), [])
                pieces.append(_Piece(number, facts["start"], facts["numel"]))
        if not self._files:
            raise DamageError(f"{folder}: holds no rank_*.safetensors; use another checkpoint")

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters, sorted."""
        return sorted(self._shapes)

    def numel(self, name: str) -> int:
        """Elements of a whole parameter."""
        return math.prod(splits.whole_shape(self._shapes[name], *self._kinds[name]))

    def slice(self, name: str, start: int, numel: int) -> Slice:
        """Elements [start, start + numel) of a whole parameter, read when asked for."""
        shape = splits.whole_shape(self._shapes[name], *self._kinds[name])
        one = Slice(
            name=name,
            shape=shape,
            split=TensorShare(),
            start=start,
            numel=numel,
            owned=True,
            read=lambda key: self.read(one, key),
            write=_read_only,
        )
        return one

    def _stretch(self, name: str, part: int, key: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of one tensor-parallel part, flattened."""
        out = torch.empty(numel, dtype=torch.float32)
        done = start
        for piece in sorted(self._pieces.get((name, part), ()), key=lambda p: p.start):
            last = min(start + numel, piece.start + piece.numel)
            # In order of their starts, so a piece that starts later leaves a gap.
            if piece.start > done or last <= done:
                continue
            wanted = out[done - start : last - start]
            self._files[piece.file].read(f"{name}|{key}", done - piece.start, wanted)
            done = last
        if done != start + numel:
            raise DamageError(
                f"{self.folder}: parameter {name!r} ({key}) is not whole: element {done} of part "
                f"{part} is in no file; use another checkpoint"
            )
        return out

    def full(self, name: str, key: str = "fp32") -> Tensor:
        """A whole parameter, or one of its moments, in fp32."""
        if name not in self._shapes:
            raise DamageError(
                f"{self.folder}: holds no parameter {name!r}; it belongs to another model"
            )
        shape, (kind, parts) = self._shapes[name], self._kinds[name]
        numel = torch.Size(shape).numel()
        shards = [self._stretch(name, p, key, 0, numel).view(shape) for p in range(parts)]
        return splits.join(shards, kind)

    def read(self, one: Slice, key: str) -> Tensor:
        """The elements of a slice of any layout: (numel,) fp32.

        Reads no more than the slice where the tensor split is that of the checkpoint; otherwise
        the whole parameter, one at a time. Raises UsageError when the model has another shape.
        """
        same = self._kinds.get(one.name) == (one.split.kind, one.split.parts)
        if same and self._shapes[one.name] == one.shape:
            return self._stretch(one.name, one.split.part, key, one.start, one.numel)
        kind, part, parts = one.split.kind, one.split.part, one.split.parts
        shape = splits.whole_shape(one.shape, kind, parts)
        fitted = fit_rows(self.full(one.name, key), shape, one.name)
        whole = splits.take(fitted, kind, part, parts)
        return whole.reshape(-1)[one.start : one.start + one.numel]


PADDED = ("wte.weight", "head.weight")
"""Parameters whose rows are tokens: their padding depends on the layout, is zero and stays zero."""


def _read_only(key: str, value: Tensor) -> None:
    raise NotImplementedError("a checkpoint's slices are not written to")


def fit_rows(whole: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """The parameter `name` with as many rows as `shape` has, padding cut or added.

    Raises UsageError when it differs from `shape` in more than padding.
    """
    if tuple(whole.shape) == tuple(shape):
        return whole
    if name not in PADDED or whole.shape[1:] != torch.Size(shape[1:]):
        raise UsageError(
            f"parameter {name!r} has shape {tuple(whole.shape)} in the checkpoint, but "
            f"{tuple(shape)} in the model; a checkpoint opens only with the [model] it was "
            "trained with"
        )
    rows = min(shape[0], whole.shape[0])
    filled = whole.new_zeros(*shape)
    filled[:rows] = whole[:rows]
    return filled

"""Writes safetensors files with one tensor in memory, whatever their size (L2)."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""torch's type -> its name in a safetensors file."""
SHARD_BYTES = 5_000_000_000
"""Largest file unless another size is given."""


def add_shard_option(parser: argparse.ArgumentParser) -> None:
    """Adds --shard-gb, whose value is `shard_bytes`."""
    parser.add_argument(
        "--shard-gb",
        dest="shard_bytes",
        type=_shard_bytes,
        default=SHARD_BYTES,
        metavar="GB",
        help=f"largest file, in 10^9 bytes (default: {SHARD_BYTES / 1e9:g})",
    )


def _shard_bytes(text: str) -> int:
    """Bytes of a number of 10^9 bytes."""
    size = float(text)
    if not 0 < size < 1e9:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and below 10^9")
    return int(size * 1e9)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """Reads and forms it, in any dtype."""


def write_tensors(
    folder: Path,
    tensors: Iterable[PlannedTensor],
    dtype: torch.dtype,
    shard_bytes: int,
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Writes files of at most `shard_bytes` each, where a tensor fits; one tensor is in memory.

    metadata: what every file says of itself. Returns name -> file.
    """
    groups = list(_groups(tensors, dtype.itemsize, shard_bytes))
    file_of: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / file, group, dtype, metadata)
        file_of |= dict.fromkeys((one.name for one in group), file)
    return file_of


def _groups(
    tensors: Iterable[PlannedTensor], itemsize: int, shard_bytes: int
) -> Iterator[list[PlannedTensor]]:
    """In order, as many as fit into one file; a larger tensor has a file to itself."""
    group: list[PlannedTensor] = []
    size = 0
    for one in tensors:
        tensor_bytes = itemsize * prod(one.shape)
        if group and size + tensor_bytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(one)
        size += tensor_bytes
    yield group


def write_safetensors(
    path: Path, tensors: Sequence[PlannedTensor], dtype: torch.dtype, metadata: Mapping[str, str]
) -> str:
    """Writes a file, flushed to the disk; its sha256. Raises OSError, ENOSPC included.

    safetensors' own save_file wants all tensors of the file at once.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _content(tensors, dtype, metadata):
            digest.update(chunk)
            file.write(chunk)
            # Or it would be there still while the next is made.
            del chunk
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _content(
    tensors: Sequence[PlannedTensor], dtype: torch.dtype, metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a file: the header's length, the header, one tensor after another."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for one in tensors:
        start, end = end, end + dtype.itemsize * prod(one.shape)
        header[one.name] = {
            "dtype": _DTYPES[dtype],
            "shape": one.shape,
            "data_offsets": [start, end],
        }
    head = json.dumps(header).encode()
    # The format wants the data aligned to 8 bytes; trailing spaces belong to the header.
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for one in tensors:
        made = one.make().detach().to("cpu", dtype)
        assert tuple(made.shape) == one.shape, f"{one.name}: {tuple(made.shape)} != {one.shape}"
        yield made.contiguous().reshape(-1).view(torch.uint8).numpy().data
        del made

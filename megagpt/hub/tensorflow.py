"""TensorFlow's checkpoints (tensor bundles), read without TensorFlow (L3).

`PREFIX.index` is a table of sorted keys in blocks, as LevelDB writes it: its last 48 bytes lead to
an index of blocks, and an entry says in which `PREFIX.data-SSSSS-of-NNNNN`, where and with which
checksum a variable's bytes lie. Both files carry CRC-32C of everything, and all of it is compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

from megagpt.errors import DamageError, UsageError
from megagpt.log.repair import masked_crc

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
"""Numbers of TensorFlow's DataType."""


@dataclass(frozen=True, slots=True)
class Variable:
    """Where one variable lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int


class Bundle:
    """The variables of one checkpoint. Raises DamageError for an index that is damaged."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.path = prefix.with_name(prefix.name + ".index")
        self.variables: dict[str, Variable] = {}
        self.shards = 1
        try:
            self._read_index(self.path.read_bytes())
        except (OSError, ValueError, IndexError, KeyError, TypeError, DecodeError) as error:
            raise DamageError(
                f"{self.path}: not a readable index of a TensorFlow checkpoint ({error}); copy it "
                "again"
            ) from None

    def _read_index(self, data: bytes) -> None:
        if len(data) < FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
            raise ValueError("its last bytes are not a table's; it was cut short")
        footer, at = data[-FOOTER:], 0
        handle = []
        for _ in range(4):  # offset and size of the meta index, which is empty, then of the index
            number, at = _varint(footer, at)
            handle.append(number)
        if any(footer[at:-8]) or any(_entries(_block(data, handle[0], handle[1]))):
            raise ValueError("its last bytes are not those that were written")
        for _, place in _entries(_block(data, handle[2], handle[3])):
            offset, at = _varint(place, 0)
            size, _ = _varint(place, at)
            for key, value in _entries(_block(data, offset, size)):
                if not key:
                    self._read_header(dict(_fields(value)))
                else:
                    self.variables[key.decode()] = _variable(value)

    def _read_header(self, header: dict[int, Any]) -> None:
        self.shards = int(header.get(1, 1))
        if header.get(2, 0):
            raise ValueError("its numbers are big-endian")

    def read(self, name: str) -> NDArray[np.float32]:
        """A variable. Raises DamageError when its bytes are not there or not those that were
        written, UsageError for a type that no weight has."""
        one = self.variables[name]
        if one.dtype not in _DTYPES:
            raise UsageError(f"{self.path}: {name} has TensorFlow's type {one.dtype}: not a number")
        file = f"{self.prefix.name}.data-{one.shard:05d}-of-{self.shards:05d}"
        path = self.prefix.with_name(file)
        try:
            with path.open("rb") as data:
                data.seek(one.offset)
                content = data.read(one.size)
        except OSError as error:
            raise DamageError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
        if masked_crc(content) != one.crc:
            raise DamageError(
                f"{path}: the bytes of {name} are not those that were written (bytes {one.offset} "
                f"to {one.offset + one.size}); copy it again"
            )
        return np.frombuffer(content, _DTYPES[one.dtype]).reshape(one.shape)


# --- the table ----------------------------------------------------------------------------------


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where the next thing begins): seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _block(data: bytes, offset: int, size: int) -> bytes:
    """A block without its trailer: how it is compressed, and the checksum of all before it."""
    end = offset + size + 1
    if end + 4 > len(data):
        raise ValueError("it ends before its blocks do")
    if masked_crc(data[offset:end]) != int.from_bytes(data[end : end + 4], "little"):
        raise ValueError(f"the block at byte {offset} is not the one that was written")
    if data[end - 1]:
        raise ValueError("its blocks are compressed, which TensorFlow never does")
    return data[offset : offset + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of a block; keys leave out what they share with the key before."""
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = len(block) - 4 - 4 * restarts, 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        size, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + size]
        at += size


def _fields(message: bytes) -> list[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer's message, of whatever kind."""
    fields = UnknownFieldSet(Empty.FromString(message))
    return [(field.field_number, field.data) for field in fields]


def _variable(message: bytes) -> Variable:
    """A BundleEntryProto; fields that are 0 are left out of it."""
    fields = dict(_fields(message))
    if 7 in fields:
        raise ValueError("a variable is cut into slices, which no checkpoint of OpenAI's has")
    shape = [dict(_fields(dim)) for number, dim in _fields(fields.get(2, b"")) if number == 2]
    return Variable(
        dtype=fields.get(1, 0),
        shape=tuple(int(dim.get(1, 0)) for dim in shape),
        shard=fields.get(3, 0),
        offset=fields.get(4, 0),
        size=fields.get(5, 0),
        crc=fields.get(6, 0),
    )

"""Recognises files of tokens made by others by their own bytes (stdlib, numpy).

Bare numbers have no header, and anything can be read as such. A file is taken for nanoGPT's uint16
only where nothing speaks against it; what it looks like instead is said. `raw` takes a file as the
numbers that the caller names, whatever it looks like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.errors import DamageError, UsageError

LLMC_HEADER = 1024
"""Bytes: 256 int32."""
LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Magic number of a shard to its version and dtype: GPT-2's and Llama 3's ids."""
RAW = ("uint16", "int32", "uint32", "int64")
SAMPLE = 1 << 20
"""Bytes at the start of a file that are looked at."""
MANY = 1000
"""Tokens that some text of a large vocabulary needs ids above 255 for."""
SPLITS = {
    "validation": {
        *("val", "valid", "validation", "validate", "valset", "dev", "devset", "develop"),
        *("eval", "evaluation", "evaluate", "evalset", "heldout", "holdout", "held", "hold"),
    },
    "test": {"test", "tests", "testing", "testset"},
}
"""Words in the names of files that hold another split than the one for training."""
MAGICS = {
    b"PK\x03\x04": "a zip archive, such as torch's",
    b"\x80\x02": "a pickle, such as torch's",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "a gzip file",
}


@dataclass(frozen=True)
class ForeignFile:
    """A file of tokens made by others."""

    path: Path
    format: str
    """megatron | nanogpt | llmc | numpy | raw"""
    dtype: np.dtype = np.dtype("<u2")
    """Of all but Megatron's, whose index says it."""
    offset: int = 0
    """Bytes before the first token."""

    @property
    def split(self) -> str:
        """The split that the name tells of: train, validation or test."""
        words = set(re.split("[^a-z]+", self.path.stem.lower()))
        return next((name for name, known in SPLITS.items() if words & known), "train")

    def tokens(self) -> npt.NDArray:
        """All tokens of a file without an index, a memory map."""
        return np.memmap(self.path, self.dtype, "r", self.offset)


def recognise(path: Path, n_vocab: int, raw: str = "") -> ForeignFile:
    """What a file is that should hold ids of `n_vocab` tokens; `raw` says it in the caller's name.

    Raises UsageError with what it looks like instead, DamageError for one that is not whole.
    """
    size = path.stat().st_size
    if path.with_suffix(".idx").exists() and path.suffix == ".bin" and not raw:
        return ForeignFile(path, "megatron")
    with path.open("rb") as file:
        head = file.read(SAMPLE)
    if not raw and int.from_bytes(head[:4], "little") in LLMC:
        found = _llmc(path, head, size)
    elif not raw and head.startswith(b"\x93NUMPY"):
        found = _numpy(path, size)
    else:
        if not raw and (look := next(_looks(path, head, size), "")):
            raise _unknown(path, look)
        found = ForeignFile(path, "raw" if raw else "nanogpt", np.dtype(raw or "u2"))
        if size % found.dtype.itemsize or not size:
            raise DamageError(
                f"{path}: {size} bytes are no {found.dtype.name} tokens; copy it again"
            )
    if found.format in ("nanogpt", "numpy") and n_vocab > 1 << 10:
        tokens = found.tokens()[:SAMPLE]
        if len(tokens) >= MANY and int(tokens.max()) < 256:
            look = f"ids of characters or bytes (all below {int(tokens.max()) + 1})"
            raise _unknown(path, f"{look}, not those of {n_vocab} tokens")
    return found


def _unknown(path: Path, look: str) -> UsageError:
    return UsageError(
        f"{path}: looks like {look}; import takes Megatron pairs, nanoGPT's uint16 .bin, llm.c "
        "shards and .npy. Text goes through data_prep/tokenize_corpus.py; where the file does hold "
        f"bare ids of the tokenizer, say which numbers with --raw {'|'.join(RAW)}"
    )


def _llmc(path: Path, head: bytes, size: int) -> ForeignFile:
    numbers = np.frombuffer(head[: len(head[:LLMC_HEADER]) // 4 * 4], "<i4")
    version, kind = LLMC[int(numbers[0])]
    dtype = np.dtype(kind)
    whole = len(numbers) == LLMC_HEADER // 4 and numbers[1] == version and not numbers[3:].any()
    if not whole or not numbers[2] or size != LLMC_HEADER + dtype.itemsize * int(numbers[2]):
        raise DamageError(
            f"{path}: not a whole llm.c shard of version {version} ({size} bytes); copy it again"
        )
    return ForeignFile(path, "llmc", dtype, LLMC_HEADER)


def _numpy(path: Path, size: int) -> ForeignFile:
    """A row of integers in numpy's own format."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python, which has many errors
        raise DamageError(f"{path}: not a whole .npy file ({error}); copy it again") from None
    kind = array.dtype
    if array.ndim != 1 or kind.kind not in "iu" or kind.str.startswith(">") or not array.size:
        shape = "x".join(map(str, array.shape))
        raise _unknown(path, f"an array of {shape} {kind}, not one row of little-endian integers")
    assert isinstance(array, np.memmap)
    if size != array.offset + array.nbytes:
        raise DamageError(
            f"{path}: {size} bytes, its header means {array.offset + array.nbytes}; copy it again"
        )
    return ForeignFile(path, "numpy", kind, array.offset)


def _looks(path: Path, head: bytes, size: int) -> Iterator[str]:
    """What else than bare uint16 tokens a file looks like; nothing where all speaks for them."""
    if path.suffix != ".bin":
        yield f"a {path.suffix} file" if path.suffix else "a file that is not called .bin"
    yield from (name for magic, name in MAGICS.items() if head.startswith(magic))
    if path.with_name(path.name + ".index").exists():
        yield "tokens of datatrove, whose .index lies beside it"
    if path.with_name("meta.pkl").exists():
        yield "nanoGPT's ids of characters: meta.pkl beside it, which is not opened, lists them"
    # A count and the offsets of so many samples, the last of them the end of the file.
    count = int.from_bytes(head[:4], "little")
    if 0 < count < len(head) // 4 - 1:
        offsets = np.frombuffer(head, "<u4", count + 1, 4).astype(np.int64)
        if offsets[-1] == size and np.all(np.diff(offsets) >= 0):
            yield f"a shard of {count} samples of Mosaic's streaming or litdata"
    yield from _text(head[:4096])
    yield from _numbers(head, size)


def _text(part: bytes) -> Iterator[str]:
    # Of the ids of real text every few have a byte below 9; no text has.
    if len(part) >= 256 and min(part) >= 9:
        yield "text"
    try:
        text = part.decode()
    except UnicodeDecodeError as error:
        cut = error.start > len(part) - 4
        text = part[: error.start].decode() if cut else ""
    if text and text.translate(dict.fromkeys(map(ord, "\t\n\r\f"))).isprintable():
        yield "text"


def _numbers(head: bytes, size: int) -> Iterator[str]:
    """Numbers of another kind."""
    if head and not any(head):
        yield "a file that was laid out and never written: zeros alone"
    numbers = np.frombuffer(head[: len(head) // 2 * 2], ">u2")
    # Of the ids of real text one in 256 or fewer ends with eight zeros.
    if len(numbers) >= 16 and np.mean(numbers < 256) > 0.9:
        yield "big-endian numbers, or UTF-16 text without its first mark"
    halves = np.frombuffer(head[: len(head) // 8 * 8], "<u2").reshape(-1, 4)
    if len(halves) < 4 or size % 4:
        return
    # The upper half of an id is at most 15.
    if not halves[:, 2:].any() and halves[:, 1].max() < 16 and size % 8 == 0:
        yield "64-bit numbers"
    elif halves[:, 1::2].max() < 16:
        yield "32-bit numbers"
    elif not halves[:, ::2].any():
        yield "big-endian numbers"
    for kind in ("<f4", "<f8"):
        values = np.abs(np.frombuffer(head[: len(head) // 8 * 8], kind))
        if size % values.itemsize == 0 and len(values) >= 64:
            if np.all((values == 0) | ((values > 1e-6) & (values < 1e6))):
                yield f"floating-point numbers of {values.itemsize} bytes"

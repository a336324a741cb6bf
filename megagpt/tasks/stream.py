"""text8 and enwik8: bits per character of the end of one long text.

Both files have 10^8 bytes, and a character is a byte. The literature trains on the first 90%,
validates on the next 5% and reports the last 5%, in the order of the file. How much context each
byte has changes the figure: a window of n_ctx tokens moves by `stride` and scores its last ones.
"""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from megagpt.corpus.progress import Progress
from megagpt.errors import UsageError
from megagpt.tasks.scoring import TaskResult
from megagpt.tokenizer.encoder import Encoder, pieces
from megagpt.use.likelihood import Pair, Scorer
from megagpt.use.score import bytes_of_tokens, ratio

NAMES = ("text8", "enwik8")
SIZE = 100_000_000
"""Bytes of either file."""
TEST = 20
"""The last one in so many bytes is the test."""
GROUP = 256
"""Windows that are held at a time."""


def test_bytes(path: Path) -> tuple[bytes, int]:
    """(the test part of a file, bytes of the whole file). Raises UsageError for none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); give the unpacked file"
        ) from None
    if len(content) < TEST:
        raise UsageError(f"{path}: {len(content)} bytes; give the unpacked file of {SIZE:,}")
    return content[-(len(content) // TEST) :], len(content)


def stream(scorer: Scorer, name: str, path: Path, stride: int = 0, most: int = 0) -> TaskResult:
    """Bits per character of the test part; each token sees at least n_ctx - stride before it.

    stride 0: n_ctx. most > 0: so many windows at most, from the beginning. Raises UsageError for a
    stride out of range and a file that is not UTF-8 where the tokenizer needs it.
    """
    stride = stride or scorer.n_ctx
    if not 1 <= stride <= scorer.n_ctx:
        raise UsageError(f"--stride {stride}: must be 1 to {scorer.n_ctx}, the model's context")
    content, whole = test_bytes(path)
    ids = _encoded(scorer, content, path)
    sizes = bytes_of_tokens(scorer.encoding, scorer.model.config.vocab_size)
    n_windows = -(-len(ids) // stride)
    n_windows = min(n_windows, most) if most else n_windows
    windows = islice(_windows([scorer.end, *ids], scorer.n_ctx, stride), n_windows)
    nats, tokens, size = [], [], []
    with Progress(f"scoring {name}", n_windows, "windows") as progress:
        while group := list(islice(windows, GROUP)):
            nats += [-one.logprob for one in scorer.likelihoods(group, progress.add)]
            tokens += [len(after) for _, after in group]
            size += [int(sizes[after].sum()) for _, after in group]
    part = "" if whole == SIZE else f", of a file of {whole:,} bytes instead of {SIZE:,}"
    return TaskResult(
        task=name,
        source=str(path),
        scoring=f"the last 5%: {sum(size):,} bytes in windows of {scorer.n_ctx} tokens that move "
        f"by {stride}{part}",
        examples=n_windows,
        shots=(0, 0),
        cut=0,
        headline="bits_per_character",
        chance=math.log2(len(set(content))),
        figures={
            "bits_per_character": ratio(np.array(nats) / math.log(2), np.array(size)),
            "loss": ratio(np.array(nats), np.array(tokens)),
        },
        correct=np.zeros(0, np.bool_),
    )


def _encoded(scorer: Scorer, content: bytes, path: Path) -> list[int]:
    """All ids of the test part, which may begin and end within a character."""
    if scorer.encoding.name == "bytes":
        return list(content)
    start = next((i for i, byte in enumerate(content[:4]) if byte & 0xC0 != 0x80), 0)
    try:
        text = content[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(content) - start or error.reason != "unexpected end of data":
            raise UsageError(
                f"{path}: not UTF-8 ({error}); only a model of the tokenizer `bytes` reads it"
            ) from None
        text = content[start : start + error.start].decode("utf-8")
    tokens, _ = Encoder(scorer.encoding, "tiktoken").encode_pieces(
        list(pieces(text, scorer.encoding))
    )
    return tokens.tolist()


def _windows(row: list[int], n_ctx: int, stride: int) -> Iterator[Pair]:
    """(context, `stride` tokens to be scored) of a row, whose first token is read alone."""
    for start in range(1, len(row), stride):
        yield row[max(0, start - (n_ctx - stride + 1)) : start], row[start : start + stride]

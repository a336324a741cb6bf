"""A corpus, cut as in training and scored by a model (numpy, torch)."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from rich import progress
from rich.console import Console

from megagpt.corpus.progress import Progress
from megagpt.corpus.verify import verify_files
from megagpt.errors import DamageError, UsageError
from megagpt.log.units import duration
from megagpt.order.loader import TokenLoader
from megagpt.order.windows import TokenWindows
from megagpt.tokenizer import fingerprint
from megagpt.use.tally import Result, Tally

if TYPE_CHECKING:
    import tiktoken

    from megagpt.model import GPT

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
"""Between two lines about how far the scoring is, where stderr is no terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a corpus is read."""

    batch_size: int = 8
    """Windows of one forward pass."""
    stride: int = 0
    """Targets that are scored in each window, a divisor of n_ctx; 0: n_ctx, as in training."""
    max_tokens: int = 0
    """Score so many tokens at most, in whole windows drawn at random, always the same; with the
    stride of training those that an evaluation within a run reads first. 0: all."""


def evaluate(
    model: "GPT", encoding: "tiktoken.Encoding", folder: Path, options: Options | None = None
) -> Result:
    """The model's loss on the corpus in `folder`, which its tokenizer `encoding` has made.

    Sums are taken in float64 token by token in an order of their own, so that the size of a batch
    shows only in the rounding of the model's matrix products. Raises UsageError for a corpus of
    another tokenizer, one smaller than a window and options that make no sense, DamageError for a
    corpus that is not what its manifest says.
    """
    options = options or Options()
    n_ctx = model.config.n_ctx
    stride = options.stride or n_ctx
    _check_options(options, n_ctx)
    # The seed of an evaluation within a run, so that both draw the same windows.
    loader = TokenLoader([(folder, 1.0)], stride, seed=0)
    store = loader.stores[0]
    store.n_windows(n_ctx)  # raises when there is none
    _check_corpus(store, encoding, model.config.vocab_size)
    n_windows = loader.n_windows
    if options.max_tokens:
        n_windows = min(n_windows, options.max_tokens // stride)
    tally = Tally(store, encoding)
    device = next(model.parameters()).device
    with _bar(f"scoring {folder}", n_windows * stride) as done:
        for targets in _targets(loader, n_windows, options.batch_size, n_ctx):
            x, y = (torch.from_numpy(ids).to(device) for ids in (targets.x, targets.y))
            losses = model.losses(x, y).double().cpu().numpy()
            tally.add(targets.places, targets.y[targets.y >= 0], losses)
            done(losses.size)
    loader.close()
    return tally.result()


@dataclass(frozen=True, slots=True)
class Targets:
    """Some windows of a corpus and what is scored in them."""

    x: NDArray[np.int64]
    """(B, n_ctx) ids that the model reads."""
    y: NDArray[np.int64]
    """(B, n_ctx) ids that follow; -1 where another window scores."""
    places: NDArray[np.int64]
    """(B * stride,) numbers in the corpus of the targets >= 0, row by row."""


def _targets(loader: TokenLoader, n_windows: int, size: int, n_ctx: int) -> Iterator[Targets]:
    """The first windows of the loader, each with n_ctx tokens before the last of its targets."""
    stride, column = loader.n_ctx, np.arange(n_ctx)
    parts = n_ctx // stride
    for first in range(0, n_windows, size):
        window = loader.places(first, min(size, n_windows - first)).window
        # The context begins whole windows earlier, or with the corpus.
        begin = np.maximum(0, window + 1 - parts)
        pieces = (begin[:, None] + np.arange(parts)).ravel()
        rows = loader.stores[0].windows(pieces, stride).reshape(-1, parts, stride + 1)
        head = rows[:, :, :-1].reshape(-1, n_ctx)
        ids = np.concatenate([head, rows[:, -1, -1:]], axis=1).astype(np.int64)
        start = ((window - begin) * stride)[:, None]
        scored = (column >= start) & (column < start + stride)
        places = window[:, None] * stride + 1 + np.arange(stride)
        yield Targets(ids[:, :-1].copy(), np.where(scored, ids[:, 1:], -1), places.ravel())


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` tokens are done, as it is told: a bar on a terminal, lines of
    logging elsewhere."""
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    task, shown = bar.add_task(label, total=total), time.monotonic()

    def done(tokens: int) -> None:
        nonlocal shown
        bar.advance(task, tokens)
        if bar.disable and time.monotonic() - shown >= LINE_EVERY_S:
            shown = time.monotonic()
            here = bar.tasks[0]
            log.info("%s: %.0f%%, %s left", label, here.percentage, duration(here.time_remaining))

    with bar:
        yield done


def _check_options(options: Options, n_ctx: int) -> None:
    stride = options.stride or n_ctx
    if options.batch_size < 1:
        raise UsageError(f"--batch-size {options.batch_size}: must be 1 window or more")
    if stride < 1 or n_ctx % stride:
        raise UsageError(
            f"--stride {options.stride}: must divide the model's context of {n_ctx} tokens"
        )
    if options.max_tokens and options.max_tokens < stride:
        raise UsageError(
            f"--max-tokens {options.max_tokens}: must be at least the {stride} tokens that one "
            "window scores"
        )


def _check_corpus(store: TokenWindows, encoding: "tiktoken.Encoding", vocab_size: int) -> None:
    """Raises UsageError for another tokenizer than the model's, DamageError for damaged shards."""
    manifest = store.manifest
    # An import may not know its tokenizer; its vocabulary must fit at least.
    unlike = manifest.fingerprint not in ("", fingerprint(encoding))
    if unlike or manifest.vocab_size != vocab_size:
        raise UsageError(
            f"{store.folder}: its tokenizer {manifest.tokenizer_name!r} ({manifest.vocab_size} "
            f"tokens) is not the model's {encoding.name!r} ({vocab_size} tokens); prepare the "
            "corpus with the model's tokenizer"
        )
    progress = Progress(f"verifying {store.folder}", sum(s.bytes for s in manifest.shards))
    problems = verify_files(manifest, progress=progress.add)
    progress.close()
    if problems:
        raise DamageError("; ".join(problems) + "; prepare or copy the corpus again")

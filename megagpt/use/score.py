"""A corpus, cut as in training, scored by a model and added up by document (L3)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import tiktoken
import torch
from numpy.typing import NDArray

from megagpt.corpus.inspect import document_sizes, first_documents
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.progress import Progress
from megagpt.corpus.verify import verify_files
from megagpt.errors import DamageError, UsageError
from megagpt.model import GPT
from megagpt.order.loader import TokenLoader
from megagpt.order.windows import TokenWindows
from megagpt.tokenizer import fingerprint
from megagpt.tokenizer.palette import Palette
from megagpt.use.evaluate import CONFIDENCE, Estimate, Result
from megagpt.use.likelihood import Scorer

HELD = 1 << 18
"""Tokens of documents that are held at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """How a corpus is read."""

    batch_size: int = 8
    """Windows of one forward pass."""
    stride: int = 0
    """Targets that are scored in each window, a divisor of n_ctx; 0: n_ctx, as in training."""
    max_tokens: int = 0
    """Score so many tokens at most, in whole windows drawn at random, always the same; with the
    stride of training those that an evaluation within a run reads first. 0: all."""


def evaluate(
    model: GPT,
    encoding: tiktoken.Encoding | Palette | None,
    folder: Path,
    options: ScoreOptions | None = None,
) -> Result:
    """The model's loss on the corpus in `folder`, which its tokenizer (or palette) `encoding` has
    made; None: its records are ids that stand for no text.

    Sums are taken in float64 token by token in an order of their own, so that the size of a batch
    shows only in the rounding of the model's matrix products. Raises UsageError for a corpus of
    another tokenizer, one smaller than a window and options that make no sense, DamageError for a
    corpus that is not what its manifest says.
    """
    options = options or ScoreOptions()
    if model.config.classes:
        raise UsageError(
            f"model.classes = {model.config.classes}: a classifier has no loss of tokens alone; "
            "its record has the loss that it was trained on, and GPT.class_scores its answers"
        )
    n_ctx = model.config.n_ctx
    stride = options.stride or n_ctx
    _check_options(options, n_ctx)
    _check_records(folder, stride, n_ctx)
    # The seed of an evaluation within a run, so that both draw the same windows.
    loader = TokenLoader([(folder, 1.0)], stride, seed=0)
    store = loader.stores[0]
    store.n_windows(n_ctx)  # raises when there is none
    check_corpus(store, encoding, model.config.vocab_size)
    n_windows = loader.n_windows
    if options.max_tokens:
        n_windows = min(n_windows, options.max_tokens // stride)
    tally = Tally(store, None if isinstance(encoding, Palette) else encoding)
    device = next(model.parameters()).device
    with Progress(f"scoring {folder}", n_windows * stride, "tokens") as progress:
        for x, y, positions in _batches(loader, n_windows, options.batch_size, n_ctx):
            inputs, targets = (torch.from_numpy(ids).to(device) for ids in (x, y))
            losses = model.losses(inputs, targets).double().cpu().numpy()  # (N,)
            tally.add(positions, y[y >= 0], losses)
            progress.add(len(x) * stride)
    loader.close()
    return tally.result()


def evaluate_apart(scorer: Scorer, folder: Path) -> Result:
    """The model's loss on each document of the corpus in `folder` by itself.

    As EleutherAI's harness scores rolling text: a document begins with END-OF-DOCUMENT, which is no
    target, and is cut into windows by megagpt.use.likelihood.document_windows. Nothing of another
    document is seen, and every token of the text is scored once. Raises UsageError for a corpus of
    another tokenizer, DamageError for a damaged one.
    """
    store = TokenWindows(folder)
    vocab_size = scorer.model.config.vocab_size
    check_corpus(store, scorer.encoding, vocab_size)
    sizes = bytes_of_tokens(scorer.encoding, vocab_size)
    nats: list[float] = []
    counted: list[tuple[int, int]] = []
    documents = store.manifest.documents
    with Progress(f"scoring {folder}", documents, "documents") as progress:
        for group in _groups(store):
            nats += [-logprob for logprob in scorer.rolling([ids.tolist() for ids in group])]
            counted += [(len(ids), int(sizes[ids].sum())) for ids in group]
            progress.add(len(group))
    tokens, bytes_ = np.array(counted, np.int64).reshape(-1, 2).T
    return totals(folder, store.n_tokens, np.array(nats), tokens, bytes_)


def _groups(store: TokenWindows) -> Iterator[list[NDArray[np.int64]]]:
    """All documents without END-OF-DOCUMENT, in order, some at a time."""
    group: list[NDArray[np.int64]] = []
    for tokens in first_documents(store.manifest, store.manifest.documents):
        group.append(np.asarray(tokens[:-1], np.int64))
        if sum(map(len, group)) >= HELD:
            yield group
            group = []
    yield group


def _batches(
    loader: TokenLoader, n_windows: int, size: int, n_ctx: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """(x, y, positions) of the loader's first windows, `size` at a time (B).

    x (B, n_ctx): ids that the model reads. y (B, n_ctx): ids that follow, -1 where another window
    scores them or the mask leaves them out. positions (N,): where in the corpus the targets >= 0
    are, row by row.
    """
    stride, column = loader.n_ctx, np.arange(n_ctx)
    store = loader.stores[0]
    n_pieces = n_ctx // stride
    for first in range(0, n_windows, size):
        window = loader.places(first, min(size, n_windows - first)).window  # (B,)
        # The context begins whole windows earlier, or with the corpus.
        begin = np.maximum(0, window + 1 - n_pieces)
        pieces = (begin[:, None] + np.arange(n_pieces)).ravel()
        rows = store.windows(pieces, stride).reshape(-1, n_pieces, stride + 1)
        head = rows[:, :, :-1].reshape(-1, n_ctx)
        ids = np.concatenate([head, rows[:, -1, -1:]], axis=1).astype(np.int64)  # (B, n_ctx + 1)
        start = ((window - begin) * stride)[:, None]
        scored = (column >= start) & (column < start + stride)
        counts = store.scored(window, stride)  # (B, stride)
        scored[scored] = counts.ravel()
        begins = np.array([store.begin(int(number), stride) for number in window])
        positions = begins[:, None] + 1 + np.arange(stride)
        yield ids[:, :-1].copy(), np.where(scored, ids[:, 1:], -1), positions[counts]


def _check_options(options: ScoreOptions, n_ctx: int) -> None:
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


def _check_records(folder: Path, stride: int, n_ctx: int) -> None:
    """Raises UsageError for a stride within records: each is read from its own start."""
    if read_manifest(folder).record_length and stride != n_ctx:
        raise UsageError(
            f"--stride {stride}: {folder} is of records, each of which is read from its start; "
            "leave --stride out"
        )


def check_corpus(
    store: TokenWindows, encoding: tiktoken.Encoding | Palette | None, vocab_size: int
) -> None:
    """Raises UsageError for another tokenizer than the model's, DamageError for damaged shards."""
    manifest = store.manifest
    own = name = ""
    if isinstance(encoding, Palette):
        own, name = encoding.fingerprint, "palette"
    elif encoding:
        own, name = fingerprint(encoding), encoding.name
    # An import may not know its tokenizer; its vocabulary must fit at least.
    if manifest.fingerprint not in ("", own) or manifest.vocab_size != vocab_size:
        raise UsageError(
            f"{store.folder}: its tokenizer {manifest.tokenizer_name!r} ({manifest.vocab_size} "
            f"tokens) is not the model's {name!r} ({vocab_size} tokens); prepare the "
            "corpus with the model's tokenizer"
        )
    size = sum(shard.bytes for shard in manifest.shards)
    with Progress(f"verifying {store.folder}", size) as progress:
        problems = verify_files(manifest, progress=progress.add)
    if problems:
        raise DamageError("; ".join(problems) + "; prepare or copy the corpus again")


class Tally:
    """What was scored, by document: nats, tokens and bytes, each (documents,)."""

    def __init__(self, store: TokenWindows, encoding: tiktoken.Encoding | None) -> None:
        """Raises DamageError when the index tells of other documents than the shards hold."""
        self.store = store
        self.ends = np.cumsum(document_sizes(store.manifest))
        if not len(self.ends) or self.ends[-1] != store.n_tokens:
            raise DamageError(
                f"{store.folder}: its index tells of {self.ends[-1:].sum():,} tokens in documents, "
                f"its shards hold {store.n_tokens:,}; run `megagpt data verify {store.folder}`"
            )
        self.token_bytes = bytes_of_tokens(encoding, store.manifest.vocab_size)
        self.nats = np.zeros(len(self.ends))
        self.tokens = np.zeros(len(self.ends), np.int64)
        self.bytes = np.zeros(len(self.ends), np.int64)

    def add(
        self, positions: NDArray[np.int64], ids: NDArray[np.int64], losses: NDArray[np.float64]
    ) -> None:
        """Counts targets, three arrays (N,): their positions in the corpus, ids, losses in nats."""
        document = np.searchsorted(self.ends, positions, side="right")
        # One after another, so that batches of any size add up in the same order.
        np.add.at(self.nats, document, losses)
        np.add.at(self.tokens, document, 1)
        np.add.at(self.bytes, document, self.token_bytes[ids])

    def result(self) -> Result:
        """The figures of everything counted."""
        return totals(self.store.folder, self.store.n_tokens, self.nats, self.tokens, self.bytes)


def bytes_of_tokens(encoding: tiktoken.Encoding | None, vocab_size: int) -> NDArray[np.int64]:
    """(V,) bytes of text that each id stands for."""
    sizes = np.zeros(vocab_size, np.int64)
    for text, token in encoding._mergeable_ranks.items() if encoding else ():
        sizes[token] = len(text)
    return sizes


def totals(
    folder: Path,
    n_tokens: int,
    nats: NDArray[np.float64],
    tokens: NDArray[np.int64],
    size: NDArray[np.int64],
) -> Result:
    """The figures of a corpus of n_tokens whose documents (documents,) have so many nats on so many
    scored tokens and bytes (`size`)."""
    scored = tokens > 0
    nats, tokens, size = nats[scored], tokens[scored], size[scored]
    loss = ratio(nats, tokens)
    return Result(
        data=str(folder),
        tokens=int(tokens.sum()),
        documents=len(tokens),
        bytes=int(size.sum()),
        left_out=n_tokens - int(tokens.sum()),
        loss=loss,
        perplexity=loss.mapped(_exp),
        bits_per_byte=ratio(nats / math.log(2), size),
    )


def ratio(sums: NDArray[Any], sizes: NDArray[Any]) -> Estimate:
    """Sum of `sums` over sum of `sizes`, each (documents,), with its interval.

    Documents are drawn independently of each other, the tokens of one are not: so each document
    is one draw of (sum, size), and the interval is the normal one of a ratio of two means
    (Cochran, Sampling Techniques, 3rd edition 1977, section 2.11). It wants some thirty documents.
    """
    n, total = len(sums), float(sizes.sum())
    if not total:
        return Estimate(math.nan, math.nan, math.nan)
    value = float(sums.sum()) / total
    if n < 2:
        return Estimate(value, math.nan, math.nan)
    spread = float(np.square(sums - value * sizes).sum())
    error = math.sqrt(n / (n - 1) * spread) / total
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return Estimate(value, value - reach, value + reach)


def _exp(value: float) -> float:
    return math.exp(value) if not value > 700 else math.inf

"""What was scored, added up by document, and how sure the figures are (numpy only)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megagpt.corpus.inspect import document_sizes
from megagpt.errors import DamageError

if TYPE_CHECKING:
    import tiktoken

    from megagpt.order.windows import TokenWindows

CONFIDENCE = 0.95
"""Of the intervals."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure of the corpus, and the interval that holds the figure of all such text with
    probability CONFIDENCE; NaN where there are too few documents to tell."""

    value: float
    low: float
    high: float

    def mapped(self, function: Callable[[float], float]) -> "Estimate":
        """A rising function of the figure."""
        return Estimate(function(self.value), function(self.low), function(self.high))


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What the model makes of one corpus."""

    data: str
    tokens: int
    """Tokens scored."""
    documents: int
    """Documents with a token among them."""
    bytes: int
    """Bytes of text that the scored tokens stand for; END-OF-DOCUMENT stands for none."""
    left_out: int
    """Tokens of the corpus that are not scored: the first, those that fill no window, and those
    beyond max_tokens."""
    loss: Estimate
    """Mean over the scored tokens, nats per token."""
    perplexity: Estimate
    """exp(loss)."""
    bits_per_byte: Estimate
    """All bits, those of END-OF-DOCUMENT too, over the bytes of text; NaN without text."""


class Tally:
    """What was scored, by document: nats, tokens and bytes, each (documents,)."""

    def __init__(self, store: "TokenWindows", encoding: "tiktoken.Encoding") -> None:
        """Raises DamageError when the index tells of other documents than the shards hold."""
        self.store = store
        self.ends = np.cumsum(document_sizes(store.manifest))
        if not len(self.ends) or self.ends[-1] != store.n_tokens:
            raise DamageError(
                f"{store.folder}: its index tells of {self.ends[-1:].sum():,} tokens in documents, "
                f"its shards hold {store.n_tokens:,}; run `megagpt data verify {store.folder}`"
            )
        self.token_bytes = np.zeros(store.manifest.vocab_size, np.int64)
        for text, token in encoding._mergeable_ranks.items():
            self.token_bytes[token] = len(text)
        self.nats = np.zeros(len(self.ends))
        self.tokens = np.zeros(len(self.ends), np.int64)
        self.bytes = np.zeros(len(self.ends), np.int64)

    def add(
        self, places: NDArray[np.int64], ids: NDArray[np.int64], losses: NDArray[np.float64]
    ) -> None:
        """Counts targets, three arrays (N,): their numbers in the corpus, ids, losses in nats."""
        document = np.searchsorted(self.ends, places, side="right")
        # One after another, so that batches of any size add up in the same order.
        np.add.at(self.nats, document, losses)
        np.add.at(self.tokens, document, 1)
        np.add.at(self.bytes, document, self.token_bytes[ids])

    def result(self) -> Result:
        """The figures of everything counted."""
        seen = self.tokens > 0
        nats, tokens, size = self.nats[seen], self.tokens[seen], self.bytes[seen]
        loss = ratio(nats, tokens)
        return Result(
            data=str(self.store.folder),
            tokens=int(tokens.sum()),
            documents=len(tokens),
            bytes=int(size.sum()),
            left_out=self.store.n_tokens - int(tokens.sum()),
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

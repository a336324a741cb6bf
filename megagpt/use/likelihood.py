"""How likely a model finds given texts, and what it says itself: many at a time (L3).

Letters: B rows of a batch, T positions, V vocabulary. A pair is (ids of the context, ids of what
follows it). Rows of a batch are filled up on the right, which a causal model does not see: a batch
of any size changes only rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

from megagpt.errors import UsageError
from megagpt.model import GPT
from megagpt.tokenizer import end_of_document
from megagpt.use.generator import Continuation, Generator, growing
from megagpt.use.options import TextOptions

Pair = tuple[list[int], list[int]]
Told = Callable[[int], object]
"""Is told how many more are done."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model makes of the second half of a pair."""

    logprob: float
    """Nats, summed over its tokens in float64."""
    greedy: bool
    """Whether each of its tokens is the likeliest after those before it."""
    tokens: int


def nothing_told(done: int) -> None:
    """Of work that nobody watches."""


class Scorer:
    """A model with its tokenizer, which answers questions about texts."""

    def __init__(self, model: GPT, encoding: tiktoken.Encoding, batch_size: int = 8) -> None:
        """batch_size: texts of one forward pass. Raises UsageError below 1."""
        if batch_size < 1:
            raise UsageError(f"--batch-size {batch_size}: must be 1 or more")
        self.model, self.encoding, self.batch_size = model.eval(), encoding, batch_size
        self.end = end_of_document(encoding)
        self.n_ctx: int = model.config.n_ctx
        self.device = next(model.parameters()).device

    def encode(self, text: str) -> list[int]:
        """Ids of a text; what looks like a special token is text."""
        return self.encoding.encode_ordinary(text)

    def pair(self, context: str, continuation: str) -> Pair:
        """The ids of both, as EleutherAI's harness cuts them: spaces at the end of the context
        belong to the continuation, and its ids are those of the whole text that the context's do
        not account for. A context without a word is END-OF-DOCUMENT. Raises UsageError for a
        continuation that has no ids of its own."""
        bare = context.rstrip()
        ids = self.encode(bare)
        whole = self.encode(context + continuation)
        if len(whole) <= len(ids):
            raise UsageError(
                f"{continuation!r:.80} after {context[-40:]!r}: has no token of its own, for the "
                "tokenizer joins it with the text before it; put a space between them"
            )
        return ids or [self.end], whole[len(ids) :]

    # --- given texts ----------------------------------------------------------------------------

    def likelihoods(
        self, pairs: Sequence[Pair], told: Told = nothing_told, banned: Sequence[int] = ()
    ) -> list[Likelihood]:
        """Of each pair, in order. Of a context that is too long the end counts.

        banned: ids that may not be the likeliest. Raises UsageError for a second half that is
        longer than n_ctx, or empty.
        """
        for _, continuation in pairs:
            if not 0 < len(continuation) <= self.n_ctx:
                raise UsageError(
                    f"{len(continuation)} tokens to be scored at once: must be 1 to {self.n_ctx}, "
                    f"the model's context; give a {'shorter' if continuation else 'longer'} text"
                )
        rows = [[*context, *after][-self.n_ctx - 1 :] for context, after in pairs]
        # The longest first: what does not fit into memory is known at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: list[Likelihood] = [Likelihood(0.0, False, 0)] * len(pairs)
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            sizes = [len(pairs[i][1]) for i in batch]
            answers = self._answers([rows[i] for i in batch], sizes, banned)
            for i, answer in zip(batch, answers, strict=True):
                found[i] = answer
            told(len(batch))
        return found

    def _answers(
        self, rows: list[list[int]], sizes: list[int], banned: Sequence[int]
    ) -> Iterator[Likelihood]:
        """Of the last `sizes` tokens of each row."""
        width = max(map(len, rows)) - 1
        x = torch.zeros(len(rows), width, dtype=torch.int64)
        y = torch.full((len(rows), width), -1)
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            x[i, : len(row) - 1] = torch.tensor(row[:-1])
            y[i, len(row) - 1 - size : len(row) - 1] = torch.tensor(row[len(row) - size :])
        losses, hits = [], []
        for logits, targets in self.model.target_logits(x.to(self.device), y.to(self.device)):
            losses.append(F.cross_entropy(logits, targets, reduction="none").double().cpu())
            if banned:
                logits[:, torch.tensor(banned, device=self.device)] = float("-inf")
            hits.append((logits.argmax(-1) == targets).cpu())
        ends = np.cumsum(sizes)
        nats, right = torch.cat(losses).numpy(), torch.cat(hits).numpy()
        for size, end in zip(sizes, ends, strict=True):
            part = slice(end - size, end)
            yield Likelihood(-float(nats[part].sum()), bool(right[part].all()), size)

    def rolling(self, documents: Sequence[Sequence[int]], told: Told = nothing_told) -> list[float]:
        """Log-likelihood in nats of each document (its ids, without END-OF-DOCUMENT) by itself:
        every token once, in the windows of `document_windows`."""
        pairs = [list(document_windows(list(ids), self.end, self.n_ctx)) for ids in documents]
        found = iter(self.likelihoods([pair for of_one in pairs for pair in of_one], told))
        return [sum(next(found).logprob for _ in of_one) for of_one in pairs]

    # --- texts of its own -----------------------------------------------------------------------

    def texts(
        self,
        prompts: Sequence[list[int]],
        options: Sequence[TextOptions],
        ended: Callable[[int, str], bool],
        told: Told = nothing_told,
    ) -> list[str]:
        """The text after each prompt, in order; none slides beyond n_ctx. A text also ends once
        ended(its number, the text so far) says so. Of a prompt that leaves no room for max_tokens
        the end counts."""
        asked = []
        for prompt, how in zip(prompts, options, strict=True):
            room = max(1, self.n_ctx - how.max_tokens)
            asked.append(Continuation(prompt[-room:], replace(how, slide=False)))

        generator = Generator(self.model, self.encoding, self.batch_size)
        made = [""] * len(asked)
        for number, piece in growing(generator, asked):
            made[number] += piece
            if asked[number].finish or ended(number, made[number]):
                told(1)
                generator.cancel(asked[number])
        return made


def document_windows(ids: list[int], end: int, n_ctx: int) -> Iterator[Pair]:
    """A document as pairs whose second halves are all of its tokens, each once.

    As the harness cuts it: the first window begins with END-OF-DOCUMENT (`end`); each window has
    n_ctx targets and one token before them, and the last one, which has fewer, as much context as
    there is room for.
    """
    row = [end, *ids]
    for start in range(1, len(row), n_ctx):
        after = row[start : start + n_ctx]
        yield row[max(0, start + len(after) - n_ctx - 1) : start], after

"""Continues many texts with one model, a token of each at a time (L3).

Letters: B texts of one call, T positions, D width, V vocabulary.

The life of a text: it waits for a free row of the cache; its prompt is read alone, piece by
piece; then every step gives one token to each text whose prompt is read, in one batch. Texts come
and go at any step. Nothing but the rounding of the batch's matrix products shows in a text of what
else is made: a draw is decided by seed, sample and position, and a prompt is always read in the
same pieces. With `alone` rows are multiplied one by one, and not even that shows.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache

import tiktoken
import torch
from torch import Tensor

from megagpt.errors import UsageError
from megagpt.model import GPT
from megagpt.model.cache import beyond_context
from megagpt.tokenizer import END_OF_DOCUMENT, end_of_document
from megagpt.use.options import TextOptions
from megagpt.use.pieces import Piece, TextStream, TokenRecord
from megagpt.use.sampling import adjusted, sample

PIECE = 256
"""Tokens of a prompt that are read at a time, and in one step of all prompts about as many: other
texts wait so long for their next token."""
SCORED = 64
"""Positions of a prompt whose log probabilities are made at a time."""


class Continuation:
    """A text that follows a prompt, as far as it is made."""

    def __init__(self, ids: Sequence[int], options: TextOptions, number: int = 0) -> None:
        self.prompt = list(ids)
        self.options = options
        self.number = number
        """Which sample of its prompt it is, from 0."""
        self.tokens: list[int] = []
        """Every token drawn, one that ended the text too."""
        self.finish = ""
        """Why it ended: stop, length, or error where the model's numbers are none."""
        self.scores: list[TokenRecord] = []
        """Of the prompt, where they were asked for; offsets are the caller's to know."""
        self.stream = TextStream(options.stop_texts)
        self._records: deque[TokenRecord] = deque()
        self._told = 0

    def tell(self, released: str) -> Piece:
        """The piece of a text that was released, with the tokens that begin in it."""
        self._told += len(released)
        # All of them at the end, but for those behind a stop text.
        whole = bool(self.finish) and not self.stream.stopped
        tokens = []
        while self._records and (whole or self._records[0].offset < self._told):
            tokens.append(self._records.popleft())
        return Piece(released, tuple(tokens))

    def record(self, one: TokenRecord) -> None:
        """Keeps what is known of a token until its text is released."""
        self._records.append(one)


class _Row:
    """A text in a row of the cache."""

    def __init__(self, text: Continuation, unread: list[int]) -> None:
        self.text = text
        self.unread = unread
        self.logits: Tensor | None = None
        """(V,) of the next token, once all is read."""


class Generator:
    """Up to `rows` texts at a time; `add` them, call `step` while it is `busy`.

    alone: multiply rows one by one, so that a text is bit for bit what it would be alone, for the
    time of so many steps.
    """

    def __init__(
        self, model: GPT, encoding: tiktoken.Encoding, rows: int = 8, alone: bool = False
    ) -> None:
        self.model, self.encoding, self.rows, self.alone = model.eval(), encoding, rows, alone
        self.n_ctx = model.config.n_ctx
        self.end = end_of_document(encoding)
        self.n_vocab = min(encoding.n_vocab, model.config.vocab_size)
        """Tokens that are drawn: those below it."""
        self.cache = model.new_cache(rows)
        self.read_tokens = 0
        """Tokens of prompts read so far."""
        self.made_tokens = 0
        """Tokens drawn so far."""
        self._device = next(model.parameters()).device
        self._waiting: deque[_Row] = deque()
        self._reading: _Row | None = None
        self._writing: list[_Row] = []
        """In rows 0 and on of the cache; the one whose prompt is read stands behind them."""
        self.word = lru_cache(1 << 16)(self._word)
        """Token -> its bytes."""

    # --- from outside ----------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether any text is unfinished."""
        return bool(self._writing or self._waiting or self._reading)

    @property
    def texts(self) -> int:
        """Texts that are read or written at the moment."""
        return len(self._writing) + bool(self._reading)

    @property
    def waiting(self) -> int:
        """Texts that wait for a row."""
        return len(self._waiting)

    def ids(self, prompt: str, options: TextOptions) -> list[int]:
        """The tokens of a prompt. Raises UsageError when there is none."""
        ids = [self.end] * options.start + self.encoding.encode_ordinary(prompt)
        if not ids:
            raise UsageError("the prompt has no token; begin with END-OF-DOCUMENT for a free text")
        return ids

    def anew(self) -> "Generator":
        """One without texts, for the same model."""
        return Generator(self.model, self.encoding, self.rows, self.alone)

    def _word(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # some vocabularies have gaps
            return b""

    def add(self, text: Continuation) -> None:
        """Takes a text. Of a prompt longer than n_ctx the last n_ctx tokens count; where the text
        must not slide, raises UsageError."""
        n = len(text.prompt)
        if n > self.n_ctx and not text.options.slide:
            raise beyond_context(n, self.n_ctx)
        self._waiting.append(_Row(text, text.prompt[-self.n_ctx :]))

    def cancel(self, text: Continuation) -> None:
        """Forgets a text, whatever has become of it."""
        self._waiting = deque(row for row in self._waiting if row.text is not text)
        if self._reading is not None and self._reading.text is text:
            self.cache.clear(len(self._writing))
            self._reading = None
        for index, row in enumerate(self._writing):
            if row.text is text:
                return self._leave(index)

    def step(self) -> list[tuple[Continuation, Piece]]:
        """Reads a piece of a prompt, makes a token of every text that is read; what has grown."""
        read = 0
        while read < PIECE and (self._reading or self._waiting) and len(self._writing) < self.rows:
            read += self._read()
        grown = []
        ended = []
        for index, row in enumerate(self._writing):
            piece = self._next_token(row)
            if piece.text or piece.tokens or row.text.finish:
                grown.append((row.text, piece))
            if row.text.finish:
                ended.append(index)
        # From the last on: a row that leaves is filled by the last.
        for index in reversed(ended):
            self._leave(index)
        self._slide()
        self._decode()
        return grown

    # --- prompts ---------------------------------------------------------------------------------

    def _read(self) -> int:
        """Reads the next piece of the prompt whose turn it is; a text that is read may write.
        Returns the tokens read."""
        row, place = self._reading or self._waiting.popleft(), len(self._writing)
        self._reading = row
        ids, row.unread = row.unread[:PIECE], row.unread[PIECE:]
        self.read_tokens += len(ids)
        tokens = torch.tensor([ids], device=self._device)
        hidden = self.model.read(tokens, self.cache, place)[0]  # (T, D)
        if row.text.options.score_prompt and not row.text.tokens:
            self._score(row.text, hidden)
        if row.unread:
            return len(ids)
        row.logits = self.model.scores(hidden[-1]).float().cpu()
        self._writing.append(row)
        self._reading = None
        if not row.text.tokens:
            self._share(row, place)
        return len(ids)

    def _share(self, read: _Row, place: int) -> None:
        """Other samples of the same prompt take what was read, as far as there are rows."""
        prompt, scored = read.text.prompt, read.text.options.scored
        for row in list(self._waiting):
            same = not row.text.tokens and row.text.options.scored == scored
            if len(self._writing) < self.rows and same and row.text.prompt == prompt:
                self.cache.copy(place, len(self._writing))
                row.logits, row.text.scores = read.logits, list(read.text.scores)
                self._writing.append(row)
                self._waiting.remove(row)

    def _score(self, text: Continuation, hidden: Tensor) -> None:
        """Log probabilities of the prompt's tokens that follow hidden (T, D)."""
        options, ids = text.options, text.prompt
        if not text.scores:
            text.scores.append(TokenRecord(ids[0], 0))
        for some in hidden.split(SCORED):
            done = len(text.scores)
            following = ids[done : done + len(some)]
            logs = self.model.scores(some)[:, : self.n_vocab].double().log_softmax(-1)
            for token, row in zip(following, logs, strict=False):
                text.scores.append(_told(TokenRecord(token, 0), row, options.logprobs))

    # --- tokens ----------------------------------------------------------------------------------

    def _next_token(self, row: _Row) -> Piece:
        """Draws the next token of a text, unless it is long enough."""
        text, options = row.text, row.text.options
        if len(text.tokens) >= options.max_tokens:
            return self._finish(text, "length")
        assert row.logits is not None
        logits = row.logits[: self.n_vocab]
        chosen = logits
        if options.changes_logits:
            ends = [token for token in (self.end, *options.stop_tokens) if token < self.n_vocab]
            chosen = adjusted(logits, options, text.prompt, text.tokens, ends)
        if not math.isfinite(float(chosen.max())):
            return self._finish(text, "error")
        token = sample(chosen, options, text.number, len(text.tokens))
        text.tokens.append(token)
        self.made_tokens += 1
        if token in options.stop_tokens or (token == self.end and options.stop):
            return self._finish(text, "stop")
        known = TokenRecord(token, text.stream.length)
        if options.logprobs >= 0:
            known = _told(known, logits.double().log_softmax(-1), options.logprobs)
        text.record(known)
        if token == self.end:
            released = text.stream.push_text(END_OF_DOCUMENT)
        else:
            released = text.stream.push(self.word(token))
        if text.stream.stopped:
            return self._finish(text, "stop", released)
        full = not options.slide and len(text.prompt) + len(text.tokens) > self.n_ctx
        if full or len(text.tokens) >= options.max_tokens:
            return self._finish(text, "length", released)
        return text.tell(released)

    def _finish(self, text: Continuation, why: str, released: str = "") -> Piece:
        released += text.stream.end()
        text.finish = "stop" if text.stream.stopped else why
        return text.tell(released)

    def _slide(self) -> None:
        """Texts at the end of the context end, or have the last half of it read anew."""
        for index in reversed(range(len(self._writing))):
            row = self._writing[index]
            if self.cache.lengths[index] < self.n_ctx:
                continue
            self._leave(index)
            context = (row.text.prompt + row.text.tokens)[-max(1, self.n_ctx // 2) :]
            self._waiting.appendleft(_Row(row.text, context))

    def _leave(self, index: int) -> None:
        """Frees a row: the last one that writes takes its place, the one that reads follows."""
        last = len(self._writing) - 1
        self._move(last, index)
        self._writing[index] = self._writing[last]
        self._writing.pop()
        if self._reading is not None:
            self._move(last + 1, last)

    def _move(self, source: int, target: int) -> None:
        self.cache.clear(target)
        if source != target:
            self.cache.copy(source, target)
            self.cache.clear(source)

    def _decode(self) -> None:
        """Reads the last token of every text that writes, in one batch or one by one."""
        rows = self._writing
        if not rows:
            return
        ids = torch.tensor([[row.text.tokens[-1]] for row in rows], device=self._device)  # (B, 1)
        size = 1 if self.alone else len(rows)
        for first in range(0, len(rows), size):
            hidden = self.model.read(ids[first : first + size], self.cache, first)
            logits = self.model.scores(hidden[:, -1]).float().cpu()  # (B, V)
            for row, one in zip(rows[first : first + size], logits, strict=True):
                row.logits = one


def _told(known: TokenRecord, logs: Tensor, count: int) -> TokenRecord:
    """The record with its log probability and the `count` likeliest of logs (V,)."""
    known.logprob = float(logs[known.token])
    if count > 0:
        top = logs.topk(min(count, len(logs)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        known.top = [(int(token), float(log)) for token, log in pairs]
        if known.token not in (token for token, _ in known.top):
            known.top.append((known.token, known.logprob))
    return known


def growing(generator: Generator, texts: Sequence[Continuation]) -> Iterator[tuple[int, str]]:
    """(number of a text, what it has grown by as soon as that is certain) of all texts to their
    ends. A text may be cancelled meanwhile."""
    number_of: dict[Continuation, int] = {}
    coming = iter(texts)
    while True:
        # A few at a time: each text that comes in is compared with those that wait.
        while generator.waiting < generator.rows and (text := next(coming, None)):
            number_of[text] = len(number_of)
            generator.add(text)
        if not generator.busy:
            return
        for text, piece in generator.step():
            yield number_of[text], piece.text


def write_texts(generator: Generator, texts: Sequence[Continuation]) -> list[str]:
    """All texts, each without its prompt."""
    made = [""] * len(texts)
    for number, piece in growing(generator, texts):
        made[number] += piece
    return made


def pieces_of(generator: Generator, text: Continuation) -> Iterator[str]:
    """What a text grows by, one string a token, empty while nothing is certain."""
    generator.add(text)
    while not text.finish:
        before = len(text.tokens)
        grown = [piece.text for _, piece in generator.step()]
        if len(text.tokens) > before or grown:
            yield "".join(grown)

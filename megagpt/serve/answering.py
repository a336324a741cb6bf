"""A request's texts on their way to the client, in one piece or as a stream (L3)."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megagpt.serve.bodies import Demand, known_tokens
from megagpt.serve.gate import Receive
from megagpt.serve.limits import ApiRefusal, Limits
from megagpt.serve.replies import DONE, PING, Reply, event, logprobs_of, usage_of
from megagpt.serve.scheduler import BROKEN, Growth, Scheduler, Ticket
from megagpt.use.dialogue import SpecialTokens, special_tokens
from megagpt.use.generator import Continuation
from megagpt.use.pieces import TextStream, TokenRecord, token_text

PING_S = 15.0
"""Seconds of silence after which a stream gets a comment."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model that a server answers for."""

    name: str
    facts: dict[str, Any]
    """What load_model tells."""
    scheduler: Scheduler
    limits: Limits
    created: int

    @property
    def chat(self) -> SpecialTokens | None:
        """How turns are written, where the tokenizer has tokens for them."""
        return special_tokens(self.scheduler.generator.encoding)

    def named(self, token: int) -> str:
        """A token as text that no other has."""
        return token_text(self.scheduler.generator.word(token))

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of ids; what is no character is replaced."""
        word = self.scheduler.generator.word
        return b"".join(map(word, ids)).decode(errors="replace")

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """The tokens that the model reads: of a text behind END-OF-DOCUMENT, ids as they are.
        Raises ApiRefusal for ids that are no tokens."""
        generator = self.scheduler.generator
        if isinstance(prompt, str):
            return [generator.end, *generator.encoding.encode_ordinary(prompt)]
        known_tokens(prompt, generator.n_vocab, "prompt")
        return prompt

    def check_model(self, name: str | None) -> None:
        """Raises ApiRefusal for another model."""
        if name not in (None, self.name):
            raise ApiRefusal(
                f"model {name!r:.80} is not served here; the model is {self.name!r}",
                404,
                "model",
                "model_not_found",
            )

    def check_length(self, ids: Sequence[int], max_tokens: int) -> None:
        """Raises ApiRefusal for a prompt and a text that no context or limit holds."""
        generator, limits = self.scheduler.generator, self.limits
        if len(ids) > (most := limits.prompt_tokens or len(ids)):
            raise ApiRefusal(f"prompt: {len(ids)} tokens; {most} at most here", param="prompt")
        if max_tokens > (most := limits.new_tokens or max_tokens):
            raise ApiRefusal(f"max_tokens = {max_tokens}: {most} at most here", param="max_tokens")
        if len(ids) + max_tokens > generator.n_ctx:
            raise ApiRefusal(
                f"the model's context is {generator.n_ctx} tokens, but {len(ids)} of the prompt "
                f"and {max_tokens} of max_tokens are {len(ids) + max_tokens}; shorten one of them",
                400,
                "max_tokens",
                "context_length_exceeded",
            )

    def check_texts(self, count: int) -> None:
        """Raises ApiRefusal for more texts than one request may have."""
        # More than it ever holds would be told for ever to try again.
        most = min(self.limits.texts, self.limits.concurrent + self.limits.queue)
        if count > most:
            raise ApiRefusal(
                f"n: {count} texts (n times prompts); {most} at most in a request", param="n"
            )


@dataclass
class Delivery:
    """One request's texts and how they are told."""

    served: Served
    reply: Reply
    wanted: Demand
    texts: list[Continuation]
    echoed: list[str]
    """What stands before each text: its prompt, or nothing."""
    skipped: list[int]
    """Tokens at the beginning of each text's prompt that the client did not send."""

    def logprobs(self, number: int, tokens: Iterable[TokenRecord], first: bool) -> Any:
        """The log probabilities of some tokens of a text; `first`: of the prompt's, too."""
        options = self.wanted.options
        if options.logprobs < 0 or self.reply.chat:
            return None
        echoed, own = self.echoed[number], list(tokens)
        told = logprobs_of(own, self.served.named, len(echoed))
        if first and options.score_prompt:
            before = logprobs_of(self._prompt_records(number), self.served.named)
            told = {key: before[key] + told[key] for key in told}
        return told

    def _prompt_records(self, number: int) -> list[TokenRecord]:
        stream, word = TextStream(), self.served.scheduler.generator.word
        records = self.texts[number].scores[self.skipped[number] :]
        for one in records:
            one.offset = stream.length
            stream.push(word(one.token))
        return records

    def usage(self) -> dict[str, int]:
        """Tokens of this request; a prompt counts once, however many texts follow it."""
        read = sum(len(text.prompt) for text in self.texts[:: self.wanted.n])
        return usage_of(read, sum(len(text.tokens) for text in self.texts))

    async def whole(self, ticket: Ticket, receive: Receive) -> dict[str, Any]:
        """All texts in one piece. Raises ApiRefusal when they cannot be made."""
        words = list(self.echoed)
        records: list[list[TokenRecord]] = [[] for _ in self.texts]
        async for growth in _growth(self.served, ticket, receive):
            for number, piece, _ in growth or ():
                words[number] += piece.text
                records[number] += piece.tokens
        choices = [
            self.reply.choice(
                number, words[number], self.logprobs(number, records[number], True), text.finish
            )
            for number, text in enumerate(self.texts)
        ]
        return self.reply.whole(choices, self.usage())

    async def events(self, ticket: Ticket, receive: Receive) -> AsyncIterator[bytes]:
        """Server-sent events, as the texts grow."""
        begun: set[int] = set()
        usage = self.wanted.include_usage
        try:
            async for growth in _growth(self.served, ticket, receive):
                if growth is None:
                    yield PING
                for number, piece, finish in growth or ():
                    if number not in begun and self.reply.chat:
                        yield event(self.reply.beginning(number, usage))
                    words = self.echoed[number] * (number not in begun) + piece.text
                    logprobs = self.logprobs(number, piece.tokens, number not in begun)
                    yield event(self.reply.part(number, words, logprobs, finish or None, usage))
                    begun.add(number)
            if usage:
                yield event(self.reply.usage(self.usage()))
            yield DONE
        except ApiRefusal as refusal:
            yield event(refusal.body())


async def _growth(served: Served, ticket: Ticket, receive: Receive) -> AsyncIterator[Growth | None]:
    """What a request's texts grow by until all are at their end; None in a silence.

    Raises ApiRefusal when the model fails, when the time is over, and when the client has gone.
    """
    deadline = time.monotonic() + served.limits.timeout_s
    gone = asyncio.ensure_future(receive())
    left = set(range(len(ticket.texts)))
    try:
        while left:
            coming = asyncio.ensure_future(ticket.grown.get())
            wait_s = min(PING_S, deadline - time.monotonic())
            await asyncio.wait({coming, gone}, timeout=wait_s, return_when="FIRST_COMPLETED")
            if not coming.done():
                coming.cancel()
                if gone.done():
                    raise ApiRefusal("the client has gone", 499)
                if time.monotonic() >= deadline:
                    limit = f"{served.limits.timeout_s:g} s"
                    raise ApiRefusal(f"the texts were not made within {limit}", 503, code="timeout")
                yield None
                continue
            growth = coming.result()
            if growth is None:
                raise ApiRefusal(BROKEN, 500)
            left -= {number for number, _, finish in growth if finish}
            if any(finish == "error" for _, _, finish in growth):
                raise ApiRefusal("the model's numbers for this text are none", 500)
            yield growth
    finally:
        gone.cancel()

"""What the server answers, in OpenAI's shapes (L3, without torch).

Shapes: the types of the official client, openai 3.57 (`openai.types`).
"""

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import orjson

from megagpt.use.pieces import TokenRecord

Named = Callable[[int], str]
"""Token -> the text that stands for it."""


class Reply:
    """The fields that every part of one answer shares."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._model = model
        self._created = int(time.time())

    def _common(self, part: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if part else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """One whole text."""
        shared = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        if self.chat:
            return {**shared, "message": {"role": "assistant", "content": text, "refusal": None}}
        return {**shared, "text": text}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """An answer in one piece."""
        return {**self._common(part=False), "choices": choices, "usage": usage}

    def part(
        self, index: int, text: str, logprobs: Any, finish: str | None, usage: bool
    ) -> dict[str, Any]:
        """A piece of one text in a stream; `usage`: whether the last event will tell it."""
        choice = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        choice |= {"delta": {"content": text}} if self.chat else {"text": text}
        made = {**self._common(part=True), "choices": [choice]}
        return {**made, "usage": None} if usage else made

    def beginning(self, index: int, usage: bool) -> dict[str, Any]:
        """The first piece of a chat's text, which tells who speaks."""
        made = self.part(index, "", None, None, usage)
        made["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return made

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last event of a stream that was asked to tell the tokens."""
        return {**self._common(part=True), "choices": [], "usage": usage}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """How many tokens were read and made."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(tree: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(tree) + b"\n\n"


DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment, which keeps proxies from closing a silent stream."""


def logprobs_of(records: Sequence[TokenRecord], named: Named, offset: int = 0) -> dict[str, Any]:
    """The classic form of log probabilities; offsets count characters of the text that is
    returned, which begins `offset` before what the records count from."""
    top = [{named(token): log for token, log in one.top} if one.top else None for one in records]
    return {
        "tokens": [named(one.token) for one in records],
        "token_logprobs": [one.logprob for one in records],
        "top_logprobs": top,
        "text_offset": [one.offset + offset for one in records],
    }


def models(name: str, facts: dict[str, Any], n_ctx: int, created: int) -> dict[str, Any]:
    """The model's entry of the list, with what is known of it."""
    told = {"step": facts["step"], "trained_tokens": facts["tokens"]}
    own = {"id": name, "object": "model", "created": created, "owned_by": "megagpt"}
    return {**own, "max_model_len": n_ctx, "tokenizer": facts["tokenizer"], **told}


def prometheus(values: Iterable[tuple[str, str, str, float]]) -> str:
    """Prometheus's text of (name, kind, help, value)."""
    lines = []
    for name, kind, text, value in values:
        full = f"megagpt_{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {value:g}"]
    return "\n".join(lines) + "\n"

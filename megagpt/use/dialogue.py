"""How the turns of a dialogue are written in tokens (L3, without torch).

A model that was trained on dialogues has tokens for the turns. For any other `PlainTurns` writes
them as a text in which two people speak.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.tokenizer import end_of_document

if TYPE_CHECKING:
    import tiktoken

ROLES = ("system", "user", "assistant")
TURN_END = "<|end|>"
"""The token that ends a turn; one of each role begins it: <|user|>."""
Turn = tuple[str, str]
"""(role, content)."""
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""What SpecialTokens writes, as transformers' templates say it; `generation` marks what a training
on answers scores."""


class ChatFormat(ABC):
    """How turns are written, and where an answer ends."""

    stop_tokens: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()

    def __init__(self, encoding: "tiktoken.Encoding") -> None:
        self.encoding = encoding
        self._end = end_of_document(encoding)

    @abstractmethod
    def turn(self, role: str, content: str) -> list[int]:
        """The tokens of one turn."""

    @abstractmethod
    def opening(self) -> list[int]:
        """The tokens after which an answer stands."""

    @abstractmethod
    def close(self, answer: list[int]) -> list[int]:
        """The turn of an answer that was made of these tokens."""

    def begin(self) -> list[int]:
        """END-OF-DOCUMENT: a dialogue is a document."""
        return [self._end]

    def ids(self, turns: Sequence[Turn]) -> list[int]:
        """Everything that is read before an answer."""
        written = [token for role, content in turns for token in self.turn(role, content)]
        return self.begin() + written + self.opening()


class SpecialTokens(ChatFormat):
    """Turns between tokens of their own, which no text can contain."""

    def __init__(self, encoding: "tiktoken.Encoding") -> None:
        super().__init__(encoding)
        special = encoding._special_tokens
        self._role = {role: special[f"<|{role}|>"] for role in ROLES}
        self._turn_end = special[TURN_END]
        self.stop_tokens = (self._turn_end, *self._role.values())

    def turn(self, role: str, content: str) -> list[int]:
        """<|role|> content <|end|>."""
        return [self._role[role], *self.encoding.encode_ordinary(content), self._turn_end]

    def opening(self) -> list[int]:
        """<|assistant|>."""
        return [self._role["assistant"]]

    def close(self, answer: list[int]) -> list[int]:
        """The answer between its tokens."""
        told = [token for token in answer if token not in (*self.stop_tokens, self._end)]
        return [*self.opening(), *told, self._turn_end]


class PlainTurns(ChatFormat):
    """`User: ...` and `Assistant: ...`, a line each, for a model without tokens for turns."""

    stop_texts = ("\nUser:", "\nAssistant:")

    def turn(self, role: str, content: str) -> list[int]:
        """The role, a colon, the content and a line's end."""
        said = content if role == "system" else f"{role.title()}: {content}"
        return self.encoding.encode_ordinary(said + "\n")

    def opening(self) -> list[int]:
        """Without a space, which belongs to the answer's first word."""
        return self.encoding.encode_ordinary("Assistant:")

    def close(self, answer: list[int]) -> list[int]:
        """The answer as its text says it."""
        told = [token for token in answer if token != self._end]
        text = self.encoding.decode_bytes(told).decode(errors="replace")
        for stop in self.stop_texts:
            text = text.partition(stop)[0]
        return self.encoding.encode_ordinary(f"Assistant: {text.strip()}\n")


def with_turns(encoding: "tiktoken.Encoding") -> "tiktoken.Encoding":
    """The tokenizer with tokens for turns: its own, or four more ids behind its last. Where the
    embedding is padded (model.vocab_multiple), these are rows that it has already."""
    import tiktoken

    names = (*(f"<|{role}|>" for role in ROLES), TURN_END)
    added = [name for name in names if name not in encoding._special_tokens]
    if not added:
        return encoding
    return tiktoken.Encoding(
        f"{encoding.name}-turns",
        pat_str=encoding._pat_str,
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens=encoding._special_tokens
        | {name: id_ for id_, name in enumerate(added, encoding.n_vocab)},
    )


def special_tokens(encoding: "tiktoken.Encoding") -> SpecialTokens | None:
    """The format of a tokenizer that has tokens for turns, None for any other."""
    names = [TURN_END, *(f"<|{role}|>" for role in ROLES)]
    known = all(name in encoding._special_tokens for name in names)
    return SpecialTokens(encoding) if known else None

"""What a server takes on at most, with units, and how it refuses (L3, without torch)."""

import math
from dataclasses import dataclass, fields
from typing import Any

from megagpt.errors import UsageError
from megagpt.use.options import option, option_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Every limit of a server; 0 or less is refused."""

    concurrent: int = option(8, "N", "texts that are made at a time", "--max-concurrent")
    """Rows of the cache."""
    queue: int = option(64, "N", "texts that wait; more are refused with 429", "--max-queue")
    texts: int = option(64, "N", "texts of one request, prompts times n", "--max-texts")
    prompt_tokens: int = option(
        0, "N", "tokens of one prompt; 0: what the context holds", "--max-prompt-tokens"
    )
    new_tokens: int = option(
        0, "N", "tokens of one text; 0: what the context holds", "--max-new-tokens"
    )
    timeout_s: float = option(600.0, "SECONDS", "seconds that a request may take")
    """From its arrival to its end."""
    body_bytes: int = option(1 << 20, "N", "bytes of a request's body", "--max-body-bytes")
    receive_s: float = option(10.0, "SECONDS", "seconds in which a request must have come")
    """Its headers, and again its body."""
    drain_s: float = option(30.0, "SECONDS", "seconds for unfinished requests when told to stop")

    def check(self) -> None:
        """Raises UsageError that names every limit that is none, by its option."""
        unlimited = ("prompt_tokens", "new_tokens")
        problems = [
            f"{option_of(one)} {value}: must be "
            + ("0 or more" if one.name in unlimited else "greater than 0, and finite")
            for one in fields(self)
            if not 0 < (value := getattr(self, one.name)) < math.inf
            and not (one.name in unlimited and value == 0)
        ]
        if problems:
            raise UsageError("\n".join(problems))


class ApiRefusal(Exception):
    """A request that is not answered as asked: its HTTP status and what the body's error says."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        told = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    @property
    def headers(self) -> dict[str, str]:
        """What a client is told beside it."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}

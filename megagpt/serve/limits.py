"""What a server takes on at most, with units, and how it refuses (L3, without torch)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megagpt.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Every limit of a server; 0 or less is refused."""

    concurrent: int = 8
    """Texts that are made at a time: rows of the cache."""
    queue: int = 64
    """Texts that wait for a row; more are refused with 429."""
    texts: int = 64
    """Texts of one request: prompts times n."""
    prompt_tokens: int = 0
    """Tokens of one prompt; 0: what the context holds."""
    new_tokens: int = 0
    """Tokens of one text's max_tokens; 0: what the context holds."""
    timeout_s: float = 600.0
    """Seconds that a request may take from its arrival to its end."""
    body_bytes: int = 1 << 20
    """Bytes of a request's body."""
    receive_s: float = 10.0
    """Seconds in which a request's headers, and again its body, must have come."""
    drain_s: float = 30.0
    """Seconds that unfinished requests are given when the server is told to stop."""

    def check(self, options: Mapping[str, str]) -> None:
        """Raises UsageError that names every limit that is none. options: field -> what sets it."""
        unlimited = ("prompt_tokens", "new_tokens")
        problems = [
            f"{options[one.name]} {value}: must be "
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

"""What stands before every request: its key, its size, its time (L3, without torch)."""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import h11
import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

from megagpt.serve.limits import ApiRefusal, Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/", "/health")
"""Paths that need no key."""
DISCARDED = 16
"""A body that is too large is read on to so many times the limit, and thrown away, so that the
refusal arrives: a connection closed on unread bytes takes it along."""


class Gate:
    """ASGI: refuses requests without the key, of strange web pages where there is none, and bodies
    that are too large or too slow; hands the body on whole, as one message."""

    def __init__(self, app: Any, limits: Limits, api_key: str, origins: Sequence[str] = ()) -> None:
        self.app, self.limits, self._key = app, limits, api_key.encode()
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        try:
            self._check_key(scope, headers)
            body = await asyncio.wait_for(self._body(headers, receive), self.limits.receive_s)
        except TimeoutError:
            problem = f"the body did not come within {self.limits.receive_s:g} s"
            return await refuse(send, ApiRefusal(problem, 408))
        except ApiRefusal as refusal:
            return await refuse(send, refusal)
        except ConnectionError:
            return None
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> MutableMapping[str, Any]:
            return pending.pop() if pending else await receive()

        return await self.app(scope, again, send)

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if scope["path"] in OPEN or scope["method"] == "OPTIONS":
            return
        if not self._key:
            return self._check_page(headers)
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self._key):
            raise ApiRefusal(
                "wrong or missing API key; send the header Authorization: Bearer KEY",
                401,
                code="invalid_api_key",
            )

    def _check_page(self, headers: dict[bytes, bytes]) -> None:
        """A browser on this machine reaches the server for any page that it shows: a page may send
        what it may not read, and read what a name of its own that leads here answers."""
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        known = not origin or origin in self._origins or "*" in self._origins
        if not known and origin.partition("://")[2] != host:
            raise ApiRefusal(
                f"web pages of {origin:.80} may not ask here; start the server with --allow-origin",
                403,
            )
        if host and not is_this_machine(host):
            raise ApiRefusal(
                f"Host: {host:.80} is no name of this machine; ask at 127.0.0.1 or localhost, or "
                "start the server with --api-key",
                403,
            )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        most = self.limits.body_bytes
        said = headers.get(b"content-length", b"0")
        parts, size, more = [], 0, True
        while more and size <= DISCARDED * most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= most:
                parts.append(part)
        if size > most:
            told = max(size, int(said)) if said.isdigit() else size
            raise ApiRefusal(
                f"the body has {told} bytes; {most} at most", 413, code="body_too_large"
            )
        return b"".join(parts)


def is_this_machine(host: str) -> bool:
    """Whether nobody else's name stands in a header Host: localhost or a number."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


async def refuse(send: Send, refusal: ApiRefusal) -> None:
    """Answers with an error, and closes the connection behind it."""
    headers = {"content-type": "application/json", "connection": "close", **refusal.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": orjson.dumps(refusal.body())})


def punctual(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection that does not send a whole request's head
    within so many seconds; by itself uvicorn waits for ever."""

    class PunctualProtocol(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._forget()
            elif self._late is None:
                self._late = self.loop.call_later(seconds, self.transport.close)

        def _forget(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return PunctualProtocol

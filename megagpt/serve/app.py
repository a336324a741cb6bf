"""The server's routes (L3)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from megagpt.serve.answering import Delivery, Served
from megagpt.serve.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    known_tokens,
    prompts_of,
    read_body,
    wanted,
)
from megagpt.serve.gate import Gate, Receive, Scope, Send
from megagpt.serve.limits import ApiRefusal
from megagpt.serve.replies import Reply, event, models, prometheus
from megagpt.use.generator import Continuation

PAGE = Path(__file__).with_name("playground.html")
DEFAULT_TOKENS = 16
"""max_tokens of a completion that names none, as OpenAI has it."""


class _Events(Response):
    """A stream of events. Its texts are freed when it ends, however it ends."""

    def __init__(self, answer: Delivery) -> None:
        super().__init__()
        self._answer = answer
        # Before the first byte, so that a full queue has a status of its own.
        self._ticket = answer.served.scheduler.submit(answer.texts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scheduler, limits = self._answer.served.scheduler, self._answer.served.limits
        names = (b"text/event-stream; charset=utf-8", b"no-cache", b"no")
        keys = (b"content-type", b"cache-control", b"x-accel-buffering")
        headers = list(zip(keys, names, strict=True))
        part = {"type": "http.response.body", "more_body": True}
        try:
            # Also a client that reads nothing ends.
            async with asyncio.timeout(limits.timeout_s + limits.drain_s):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async for content in self._answer.events(self._ticket, receive):
                    await send({**part, "body": content})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            await send({"type": "http.response.body", "body": event(_stopped().body())})
        finally:
            scheduler.cancel(self._ticket)


def build_app(served: Served, api_key: str, allow_origin: list[str]) -> Any:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        served.scheduler.close()

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiRefusal, _refused)
    app.add_exception_handler(HTTPException, _unrouted)
    app.add_exception_handler(Exception, _failed)
    _add_open_routes(app, served)
    _add_model_routes(app, served)
    _add_text_routes(app, served)
    gated = Gate(app, served.limits, api_key, allow_origin)
    if not allow_origin:
        return gated
    return CORSMiddleware(
        gated, allow_origins=allow_origin, allow_methods=["*"], allow_headers=["*"]
    )


def _json(tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(tree), status, headers, "application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiRefusal)
    return _json(error.body(), error.status, error.headers)


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    refusal = ApiRefusal(f"{request.method} {path}: {error.detail}", error.status_code)
    return _json(refusal.body(), refusal.status)


async def _failed(request: Request, error: Exception) -> Response:
    return _json(ApiRefusal("an error of the server; its log says which", 500).body(), 500)


def _add_open_routes(app: FastAPI, served: Served) -> None:
    """What needs no key: the page, and whether the server is well."""
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        return HTMLResponse(
            page, headers={"Content-Security-Policy": policy + "connect-src 'self'"}
        )

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"})


def _add_model_routes(app: FastAPI, served: Served) -> None:
    """What is told of the model, its tokenizer and its work."""
    generator = served.scheduler.generator
    model = models(served.name, served.facts, generator.n_ctx, served.created)
    model |= {"chat": served.chat is not None}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(prometheus(served.scheduler.figures()))

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        served.check_model(name)
        return _json(model)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        # A body has a megabyte at most; still the loop must not wait for it.
        return await asyncio.to_thread(_tokenized, served, await request.body())

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await asyncio.to_thread(_detokenized, served, await request.body())


def _tokenized(served: Served, content: bytes) -> Response:
    body = read_body(TokenizeBody, content)
    served.check_model(body.model)
    generator = served.scheduler.generator
    ids = generator.encoding.encode_ordinary(body.prompt)
    ids = [generator.end] * bool(body.add_special_tokens) + ids
    told = {"count": len(ids), "max_model_len": generator.n_ctx, "tokens": ids}
    return _json({**told, "token_strs": [served.named(one) for one in ids]})


def _detokenized(served: Served, content: bytes) -> Response:
    body = read_body(DetokenizeBody, content)
    served.check_model(body.model)
    known_tokens(body.tokens, served.scheduler.generator.encoding.n_vocab, "tokens")
    return _json({"prompt": served.text_of(body.tokens)})


def _add_text_routes(app: FastAPI, served: Served) -> None:
    """What makes text."""

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _respond(
            await asyncio.to_thread(_completion, served, await request.body()), request
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _respond(await asyncio.to_thread(_chat, served, await request.body()), request)


async def _respond(answer: Delivery, request: Request) -> Response:
    if answer.wanted.stream:
        return _Events(answer)
    with answer.served.scheduler.made(answer.texts) as ticket:
        try:
            return _json(await answer.whole(ticket, request.receive))
        except asyncio.CancelledError:
            raise _stopped() from None


def _stopped() -> ApiRefusal:
    """What a request is told that is cut off: uvicorn cancels those that are not finished when the
    time to drain is over."""
    return ApiRefusal("the server stops, and the texts are not finished", 503, code="stopped")


def _completion(served: Served, content: bytes) -> Delivery:
    """Reads a request. Raises ApiRefusal."""
    body = read_body(CompletionBody, content)
    served.check_model(body.model)
    if body.suffix:
        raise ApiRefusal("suffix: the model cannot fill a gap; leave it out", param="suffix")
    if body.best_of not in (None, body.n or 1):
        raise ApiRefusal(f"best_of = {body.best_of}: only n itself", param="best_of")
    echo = bool(body.echo)
    more = {
        "max_tokens": DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens,
        "logprobs": -1 if body.logprobs is None else body.logprobs,
        "score_prompt": echo and body.logprobs is not None,
    }
    generator = served.scheduler.generator
    asked = wanted(body, generator.n_vocab, generator.end, more)
    prompts = prompts_of(body.prompt)
    served.check_texts(len(prompts) * asked.n)
    texts, echoed = [], []
    for prompt in prompts:
        ids = served.prompt_ids(prompt)
        served.check_length(ids, asked.options.max_tokens)
        before = prompt if isinstance(prompt, str) else served.text_of(prompt)
        texts += [Continuation(ids, asked.options, number) for number in range(asked.n)]
        echoed += [before if echo else ""] * asked.n
    # The END-OF-DOCUMENT before a text is not the client's.
    skipped = [int(isinstance(prompt, str)) for prompt in prompts for _ in range(asked.n)]
    return Delivery(served, Reply(served.name, chat=False), asked, texts, echoed, skipped)


def _chat(served: Served, content: bytes) -> Delivery:
    """Reads a request. Raises ApiRefusal."""
    body = read_body(ChatBody, content)
    served.check_model(body.model)
    chat = served.chat
    if chat is None:
        raise ApiRefusal(
            "this model has no chat format: its tokenizer has no tokens for turns; use "
            "/v1/completions",
            code="no_chat_format",
        )
    if not body.messages:
        raise ApiRefusal("messages: an empty list; give at least one", param="messages")
    ids = chat.ids([(one.role, one.content) for one in body.messages])
    most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    room = served.limits.new_tokens or served.scheduler.generator.n_ctx
    free = min(room, max(1, served.scheduler.generator.n_ctx - len(ids)))
    more = {"max_tokens": free if most is None else most, "stop_tokens": chat.stop_tokens}
    generator = served.scheduler.generator
    asked = wanted(body, generator.n_vocab, generator.end, more)
    served.check_texts(asked.n)
    served.check_length(ids, asked.options.max_tokens)
    texts = [Continuation(ids, asked.options, number) for number in range(asked.n)]
    blank = [""] * asked.n
    return Delivery(served, Reply(served.name, chat=True), asked, texts, blank, [0] * asked.n)

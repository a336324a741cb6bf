"""What clients send, read strictly: an unknown or impossible field is named (L3, without torch).

The bounds of what shapes a text are those of every command (`TextOptions` in use/options.py).
JSON is read by orjson, which takes neither NaN nor halves of surrogate pairs nor endless depth.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from megagpt.errors import UsageError
from megagpt.serve.limits import ApiRefusal
from megagpt.use.options import BIAS, SHOWN, TextOptions

MOST_STOPS = 16
"""Stop texts of a request."""
MOST_ENTRIES = 1024
"""Entries of a field that is no prompt: tokens with a bias, tokens that stop."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None


class _Drawn(_Body):
    """The fields that completions and chat completions share."""

    model: str
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    user: str | None = None


def _prompt(given: Any) -> Any:
    # Pydantic would try four types and keep an error of each entry: a gigabyte of them.
    if isinstance(given, str) or _all_are(given, str) or _all_are(given, int):
        return given
    if _all_are(given, list) and all(_all_are(one, int) for one in given):
        return given
    rule = "must be a text, a list of texts, of token ids, or of lists of token ids"
    raise PydanticCustomError("prompt", rule)


def _all_are(given: Any, kind: type) -> bool:
    return isinstance(given, list) and all(type(one) is kind for one in given)


class CompletionBody(_Drawn):
    """POST /v1/completions."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class ChatMessage(_Body):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None


class ChatBody(_Drawn):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(fail_fast=True)
    max_completion_tokens: int | None = None


class TokenizeBody(_Body):
    """POST /tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(_Body):
    """POST /detokenize."""

    tokens: list[int] = Field(fail_fast=True)
    model: str | None = None


AnyBody = TypeVar("AnyBody", bound=_Body)


def read_body(kind: type[AnyBody], content: bytes) -> AnyBody:
    """The body of a request. Raises ApiRefusal that names the field."""
    try:
        tree = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ApiRefusal(f"the body is no JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ApiRefusal("the body must be a JSON object")
    _check_entries(tree, kind)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        value = repr(first["input"])
        value = value if len(value) <= SHOWN else value[:SHOWN] + "..."
        if first["type"] == "missing":
            raise ApiRefusal(f"field {field} is missing", param=field) from None
        raise ApiRefusal(f"field {field} = {value}: {first['msg']}", param=field) from None


def _check_entries(tree: Mapping[str, Any], kind: type[_Body]) -> None:
    """Raises ApiRefusal for an unknown field, and for more entries than are worth a look each."""
    for field, value in tree.items():
        if field not in kind.model_fields:
            raise ApiRefusal(f"unknown field {field:.{SHOWN}}", param=field[:SHOWN])
        large = isinstance(value, dict | list) and len(value) > MOST_ENTRIES
        if large and field not in ("prompt", "messages", "tokens"):
            problem = f"{field}: {len(value)} entries; {MOST_ENTRIES} at most"
            raise ApiRefusal(problem, param=field)


_SAME = (
    *("frequency_penalty", "min_tokens", "presence_penalty", "repetition_penalty"),
    *("temperature", "top_k", "top_p"),
)
"""Fields that TextOptions has as well."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a completion or a chat completion asks for beside its prompt."""

    options: TextOptions
    n: int
    stream: bool
    include_usage: bool


def wanted(body: _Drawn, n_vocab: int, end: int, more: dict[str, Any]) -> Demand:
    """The options of a request, drawn from `more` where the two kinds differ.

    Raises ApiRefusal for what makes no sense, for tokens outside the vocabulary, and where none of
    it may be drawn; end: END-OF-DOCUMENT.
    """
    n = 1 if body.n is None else body.n
    if n < 1:
        raise ApiRefusal(f"n = {n}: must be 1 or more", param="n")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MOST_STOPS:
        raise ApiRefusal(f"stop: {len(stops)} texts; {MOST_STOPS} at most", param="stop")
    stop_tokens = body.stop_token_ids or []
    known_tokens(stop_tokens, n_vocab, "stop_token_ids")
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    options = TextOptions(
        **{"temperature": 1.0} | given,
        logit_bias=_biases(body.logit_bias or {}, n_vocab),
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        stop=not body.ignore_eos,
        stop_texts=tuple(stops),
        slide=False,
        **more | {"stop_tokens": (*more.get("stop_tokens", ()), *stop_tokens)},
    )
    try:
        options.check()
    except UsageError as error:
        name = str(error).split(" ")[0]
        param = {"stop_texts": "stop"}.get(name, name)
        raise ApiRefusal(str(error).splitlines()[0].replace(name, param, 1), param=param) from None
    _check_choice(options, n_vocab, end)
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Demand(options, n, bool(body.stream), usage)


def _biases(given: Mapping[str, float], n_vocab: int) -> dict[int, float]:
    try:
        biases = {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise ApiRefusal("logit_bias: its keys must be token ids", param="logit_bias") from None
    known_tokens(list(biases), n_vocab, "logit_bias")
    return biases


def _check_choice(options: TextOptions, n_vocab: int, end: int) -> None:
    forbidden = {token for token, bias in options.logit_bias.items() if bias <= -BIAS}
    if options.min_tokens:
        forbidden |= {end, *options.stop_tokens}
    if len(forbidden.intersection(range(n_vocab))) == n_vocab:
        raise ApiRefusal(
            f"logit_bias and min_tokens forbid all {n_vocab} tokens; leave one", param="logit_bias"
        )


def known_tokens(ids: Sequence[int], n_vocab: int, field: str) -> None:
    """Raises ApiRefusal for an id that is no token."""
    strange = next((one for one in ids if not 0 <= one < n_vocab), None)
    if strange is not None:
        raise ApiRefusal(
            f"{field}: {strange} is no token; the vocabulary has {n_vocab}, 0 to {n_vocab - 1}",
            param=field,
        )


def prompts_of(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a request, each a text or ids. Raises ApiRefusal for none."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or any(isinstance(one, list) and not one for one in prompt):
        raise ApiRefusal("prompt: an empty list; give a text, or at least one token", 400, "prompt")
    return [prompt] if isinstance(prompt[0], int) else prompt

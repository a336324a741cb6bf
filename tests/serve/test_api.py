"""The official client against a real server: what it sends is understood, what it gets it reads."""

import asyncio
import json
import time
from collections.abc import Iterator

import httpx2
import openai
import pytest
import torch

from megagpt.checkpoint import load_model
from megagpt.use.generate import generate
from megagpt.use.options import TextOptions
from tests.lib.server import chat_folder, shared_server


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=shared_server().url + "/v1", api_key="x", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory):
    """(model, encoding) of the same weights, here."""
    model, encoding, _ = load_model(chat_folder(tmp_path_factory.mktemp("here")))
    return model, encoding


def text(ours, prompt: str, **options) -> str:
    return "".join(generate(*ours, prompt, TextOptions(**{"temperature": 1.0} | options)))


def test_the_model_is_listed(client):
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "megagpt")
    assert client.models.retrieve("tiny") == model
    told = httpx2.get(shared_server().url + "/v1/models").json()["data"][0]
    assert told["max_model_len"] == 4096 and told["chat"] is True


def test_a_completion_is_that_of_the_command(client, ours):
    for prompt, seed in (("Once", 1), ("", 2), ("caf\u00e9 <|endoftext|>", 3)):
        done = client.completions.create(model="tiny", prompt=prompt, seed=seed, max_tokens=20)
        expected = text(ours, prompt, seed=seed, max_tokens=20)
        assert done.object == "text_completion" and done.model == "tiny"
        assert [choice.text for choice in done.choices] == [expected]
        assert done.usage.prompt_tokens == 1 + len(prompt.encode())
        assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    defaults = client.completions.create(model="tiny", prompt="a", extra_body={"ignore_eos": True})
    assert defaults.usage.completion_tokens == 16 and defaults.choices[0].finish_reason == "length"


def test_prompts_and_samples_come_in_order(client, ours):
    done = client.completions.create(
        model="tiny", prompt=["one", "two, longer"], n=3, best_of=3, seed=5, max_tokens=12
    )
    assert [choice.index for choice in done.choices] == list(range(6))
    firsts = [done.choices[0].text, done.choices[3].text]
    assert firsts == [text(ours, p, seed=5, max_tokens=12) for p in ("one", "two, longer")]
    assert len({choice.text for choice in done.choices}) == 6
    ids = client.completions.create(
        model="tiny", prompt=[[256, *b"one"], [*b"two"]], seed=5, max_tokens=12
    )
    assert ids.choices[0].text == firsts[0]
    assert ids.choices[1].text == text(ours, "two", seed=5, max_tokens=12, start=False)


def test_a_stream_is_the_text_in_pieces(client):
    asked = {"model": "tiny", "prompt": ["ab", "c"], "n": 2, "seed": 7, "max_tokens": 30}
    whole = client.completions.create(**asked, logprobs=2, echo=True)
    made, tokens, finish = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]
    events = list(
        client.completions.create(
            **asked, logprobs=2, echo=True, stream=True, stream_options={"include_usage": True}
        )
    )
    assert events[-1].choices == [] and events[-1].usage == whole.usage
    assert all(one.usage is None and one.id == events[0].id for one in events[:-1])
    for [choice] in (one.choices for one in events[:-1]):
        made[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens
        finish[choice.index].append(choice.finish_reason)
    assert made == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    for found, choice in zip(finish, whole.choices, strict=True):
        assert found == [*[None] * (len(found) - 1), choice.finish_reason]
    assert len(events) > 20


def test_log_probabilities_of_prompt_and_text(client, ours):
    model, _ = ours
    prompt = [*"na\u00efve".encode()]
    done = client.completions.create(
        model="tiny", prompt=prompt, echo=True, logprobs=3, max_tokens=5, temperature=0
    )
    [choice] = done.choices
    found = choice.logprobs
    assert choice.text.startswith("na\u00efve")
    assert found.tokens[:4] == ["n", "a", "bytes:\\xc3", "bytes:\\xaf"]
    assert found.text_offset[:6] == [0, 1, 2, 2, 3, 4]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert len(found.tokens) == len(prompt) + done.usage.completion_tokens
    logs = model.logits(torch.tensor([prompt]))[0].detach().double().log_softmax(-1)
    expected = [float(logs[i, token]) for i, token in enumerate(prompt[1:])]
    assert found.token_logprobs[1 : len(prompt)] == pytest.approx(expected, abs=1e-5)
    for token, log, top in list(
        zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True)
    )[1:]:
        assert top[token] == log and len(top) in (3, 4)
    # Greedy: the chosen one is the largest, as the same float.
    for log, top in zip(
        found.token_logprobs[len(prompt) :], found.top_logprobs[len(prompt) :], strict=True
    ):
        assert log == max(top.values())


def test_scoring_alone_and_a_text_prompt(client):
    scored = client.completions.create(
        model="tiny", prompt="abc", echo=True, logprobs=1, max_tokens=0
    )
    [choice] = scored.choices
    assert (choice.text, choice.logprobs.tokens) == ("abc", ["a", "b", "c"])
    assert None not in choice.logprobs.token_logprobs  # END-OF-DOCUMENT stands before it
    assert scored.usage.completion_tokens == 0 and choice.finish_reason == "length"
    assert client.completions.create(model="tiny", prompt="abc", max_tokens=0).choices[0].text == ""


def test_stop_texts_and_biases(client):
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 9, "temperature": 0}
    always = {"logit_bias": {"65": 100}}
    done = client.completions.create(**asked, **always)
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("A" * 9, "length")
    ended = client.completions.create(**asked, logit_bias={"256": 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    # The frequency penalty drives B's logit below A's, then A's below B's.
    turns = client.completions.create(
        **asked, logit_bias={"65": 99, "66": 100}, frequency_penalty=2.0, stop=["ABAB"]
    )
    assert turns.choices[0].finish_reason == "stop" and set(turns.choices[0].text) <= {*"AB"}
    assert "ABAB" not in turns.choices[0].text


def test_chat(client, ours):
    model, encoding = ours
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|end|> Hi"}]
    asked = {"model": "tiny", "messages": turns, "seed": 3, "max_completion_tokens": 15}
    done = client.chat.completions.create(**asked)
    ids = [256, 257, *b"Be brief.", 260, 258, *b"<|end|> Hi", 260, 259]
    same = client.completions.create(
        model="tiny", prompt=ids, seed=3, max_tokens=15, extra_body={"stop_token_ids": [260]}
    )
    message = done.choices[0].message
    assert message.role == "assistant" and done.usage.prompt_tokens == len(ids)
    assert same.choices[0].text.startswith(message.content)
    parts = [part.choices[0] for part in client.chat.completions.create(**asked, stream=True)]
    assert parts[0].delta.role == "assistant" and parts[-1].finish_reason is not None
    assert "".join(part.delta.content or "" for part in parts) == message.content


def test_tokens(ours):
    url = shared_server().url
    told = httpx2.post(url + "/tokenize", json={"prompt": "caf\u00e9"}).json()
    assert told["tokens"] == [*"caf\u00e9".encode()] and told["count"] == 5
    assert told["token_strs"][-2:] == ["bytes:\\xc3", "bytes:\\xa9"]
    again = httpx2.post(url + "/detokenize", json={"tokens": told["tokens"]}).json()
    assert again == {"prompt": "caf\u00e9"}
    started = httpx2.post(url + "/tokenize", json={"prompt": "", "add_special_tokens": True})
    assert started.json()["tokens"] == [256]


def test_health_metrics_and_the_page():
    url = shared_server().url
    assert httpx2.get(url + "/health").json() == {"status": "ok"}
    page = httpx2.get(url + "/")
    assert (
        "<textarea" in page.text and "default-src 'none'" in page.headers["content-security-policy"]
    )
    assert not any(word in page.text for word in ("http://", "https://", "src="))
    figures = metrics()
    assert figures["megagpt_generated_tokens_total"] >= 0 and figures["megagpt_uptime_seconds"] > 0


def metrics() -> dict[str, float]:
    text = httpx2.get(shared_server().url + "/metrics").text
    rows = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in rows}


def test_sixty_four_clients_get_their_own_texts(client):
    """Each asks for a text of one letter of its own, streamed or whole."""
    letters = [chr(48 + number) for number in range(64)]

    async def ask(maker: openai.AsyncOpenAI, letter: str) -> tuple[str, str]:
        asked = {
            "model": "tiny", "prompt": letter * 3, "max_tokens": 10, "echo": True,
            "logit_bias": {str(ord(letter)): 100},
        }  # fmt: skip
        if ord(letter) % 2:
            return letter, (await maker.completions.create(**asked)).choices[0].text
        stream = await maker.completions.create(**asked, stream=True)
        return letter, "".join([part.choices[0].text async for part in stream])

    async def everyone() -> list[tuple[str, str]]:
        url = shared_server().url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as maker:
            return await asyncio.gather(*(ask(maker, letter) for letter in letters))

    assert asyncio.run(everyone()) == [(letter, letter * 13) for letter in letters]
    assert metrics()["megagpt_texts_unfinished"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row_within_a_second(stream):
    body = {
        "model": "tiny",
        "prompt": "a",
        "max_tokens": 4000,
        "stream": stream,
        "ignore_eos": True,
    }
    url, before = shared_server().url, metrics()["megagpt_requests_cancelled_total"]
    with httpx2.Client(timeout=0.7 if not stream else 30) as client:
        if stream:
            with client.stream("POST", url + "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                assert metrics()["megagpt_texts_unfinished"] == 1
        else:
            with pytest.raises(httpx2.TimeoutException):
                client.post(url + "/v1/completions", json=body)
    t0 = time.monotonic()
    while metrics()["megagpt_texts_unfinished"]:
        assert time.monotonic() - t0 < 60, "the text is still being written"
        time.sleep(0.02)
    assert metrics()["megagpt_requests_cancelled_total"] == before + 1


def test_errors_have_the_clients_shape(client):
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4' is not served here") as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(
        openai.BadRequestError, match="context is 4096 tokens, but 2 .* 4095"
    ) as long:
        client.completions.create(model="tiny", prompt="a", max_tokens=4095)
    assert long.value.code == "context_length_exceeded" and long.value.status_code == 400
    with pytest.raises(openai.BadRequestError, match="cannot fill a gap"):
        client.completions.create(model="tiny", prompt="a", suffix="b")
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: Not Found"):
        client.embeddings.create(model="tiny", input="a")
    body = httpx2.post(shared_server().url + "/v1/completions", content=b"{").json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert json.dumps(body).startswith('{"error"')

"""How the server starts and ends: keys, addresses, ports, signals; what it does when all fails."""

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import httpx2
import pytest

from megagpt import cli
from megagpt.cli import main
from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError
from megagpt.serve import command
from megagpt.serve.app import build_app
from megagpt.serve.limits import Limits
from megagpt.tokenizer import load_tokenizer
from megagpt.use.generator import Continuation, Generator
from megagpt.use.options import TextOptions, given, option_of
from megagpt.use.together import placed_generator
from tests.lib.server import chat_folder, serving
from tests.lib.weights import weights_folder
from tests.serve.test_attacks import BASE
from tests.use.test_generator import CONFIG


def parse(*words: str) -> argparse.Namespace:
    return cli.parser("serve").parse_args(["serve", *words])


def test_what_cannot_be_served_is_told_before_the_model_is_loaded(monkeypatch):
    monkeypatch.delenv("MEGAGPT_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, message in (
            (("--host", "0.0.0.0"), "--host 0.0.0.0: other machines could use the model; give"),
            (("--host", "example.org"), "other machines could use the model"),
            (("--api-key", "\N{EURO SIGN}"), "--api-key: must be ASCII"),
            (("--api-key", "from a file\n"), "--api-key: must be ASCII without spaces"),
            (("--port", "70000"), "--port 70000: must be 0 to 65535"),
            (("--port", port), f"--port {port}: cannot listen there .*; choose another"),
            (("--max-concurrent", "0"), "--max-concurrent 0: must be greater than 0"),
            (("--timeout-s", "-1"), "--timeout-s -1.0: must be greater than 0"),
            (("--drain-s", "inf"), "--drain-s inf: must be greater than 0, and finite"),
            (("--max-new-tokens", "-1"), "--max-new-tokens -1: must be 0 or more"),
        ):
            with pytest.raises(UsageError, match=message):
                command.run(parse("nowhere", *words))


def test_the_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(
        UsageError, match=r"needs FastAPI and uvicorn .*pip install -e '\.\[serve\]' in megagpt's"
    ):
        command.run(parse("nowhere"))


def test_a_key_guards_and_a_signal_drains(tmp_path):
    """Off loopback with a key; a stream that has begun is finished after SIGTERM."""
    folder = chat_folder(tmp_path)
    options = ("--host", "0.0.0.0", "--api-key", "secret", "--allow-origin", "http://a.example")
    with serving(folder, tmp_path / "log", *options) as server:
        ask = f"{server.url}/v1/completions"
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = httpx2.post(ask, json=BASE, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert httpx2.get(server.url + "/metrics", headers=headers).status_code == 401
        assert httpx2.get(server.url + "/health").status_code == 200
        key = {"Authorization": "Bearer secret", "Origin": "http://a.example"}
        body = {**BASE, "model": "weights", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        with httpx2.stream("POST", ask, json=body, headers=key, timeout=60) as answer:
            assert answer.headers["access-control-allow-origin"] == "http://a.example"
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(httpx2.TransportError):
                httpx2.get(server.url + "/health")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        last = json.loads(rest[-2].removeprefix("data: "))["choices"][0]
        assert last["finish_reason"] == "length"
        assert server.process.wait(timeout=20) == 0
        assert server.log.read_text().rstrip().endswith("stopped")


def test_what_a_signal_cuts_off_is_told_so(tmp_path):
    config = ModelConfig(n_layer=2, n_head=2, d_model=32, n_ctx=20_000, vocab_size=257)
    weights_folder(tmp_path / "long", config, "bytes")
    body = {"model": "long", "prompt": "a", "max_tokens": 19_000, "ignore_eos": True}
    with (
        serving(tmp_path / "long", tmp_path / "log", "--drain-s", "1") as server,
        ThreadPoolExecutor() as pool,
    ):
        ask = f"{server.url}/v1/completions"
        whole = pool.submit(httpx2.post, ask, json=body, timeout=60)
        with httpx2.stream("POST", ask, json={**body, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            while "megagpt_texts_unfinished 2" not in httpx2.get(server.url + "/metrics").text:
                time.sleep(0.05)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        for error in (json.loads(last.removeprefix("data: ")), whole.result().json()):
            assert error["error"]["message"] == "the server stops, and the texts are not finished"
        assert whole.result().status_code == 503
        assert server.process.wait(timeout=20) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_right_at_the_start_ends_it_as_any(tmp_path, number):
    with serving(chat_folder(tmp_path), tmp_path / "log", poll_s=0.001) as server:
        server.process.send_signal(number)
        assert server.process.wait(timeout=20) == 0
    assert server.log.read_text().rstrip().endswith("stopped")


def served_here(folder: Path, limits: Limits):
    """What a server of these weights answers with."""
    with placed_generator(parse(str(folder)), limits.concurrent) as (generator, facts):
        return command.served_by(generator, facts, "plain", limits)


@pytest.fixture
def served(tmp_path):
    """(the app's facts, the app) of a model without tokens for turns, in this process."""
    weights_folder(tmp_path / "plain", CONFIG, load_tokenizer("bytes").name)
    made = served_here(tmp_path / "plain", Limits(timeout_s=2.0))
    yield made, build_app(made, "", [])
    made.scheduler.close()


@contextlib.contextmanager
def client_of(app):
    """A client of an app in this process."""

    async def call(method: str, path: str, **more):
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **more)

    yield lambda *words, **more: asyncio.run(call(*words, **more))


def test_no_chat_without_tokens_for_turns(served):
    with client_of(served[1]) as ask:
        body = {"model": "plain", "messages": [{"role": "user", "content": "Hi"}]}
        answer = ask("POST", "/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "no_chat_format"
        assert ask("GET", "/v1/models").json()["data"][0]["chat"] is False


def test_a_model_that_fails_fails_its_requests_and_no_others(served, caplog):
    made, app = served
    with client_of(app) as ask:
        body = {"model": "plain", "prompt": "a", "max_tokens": 3}
        scheduler = made.scheduler
        norm = scheduler.generator.model.ln_f
        failing = norm.register_forward_pre_hook(lambda *call: 1 / 0)
        for stream in (False, True):
            answer = ask("POST", "/v1/completions", json={**body, "stream": stream})
            told = answer.text if stream else json.dumps(answer.json())
            assert "the server's log says how" in told
            assert answer.status_code == (200 if stream else 500)
        failing.remove()
        assert ask("POST", "/v1/completions", json=body).status_code == 200
    assert "ZeroDivisionError" in caplog.text and scheduler.failed == 2
    assert scheduler.load == 0


def test_what_takes_too_long_is_503(served):
    made, app = served
    go_on = threading.Event()
    norm = made.scheduler.generator.model.ln_f
    slow = norm.register_forward_pre_hook(lambda *call: go_on.wait(30) and None)
    with client_of(app) as ask:
        body = {"model": "plain", "prompt": "a", "max_tokens": 3}
        answer = ask("POST", "/v1/completions", json=body)
        assert answer.status_code == 503 and "within 2 s" in answer.json()["error"]["message"]
        assert made.scheduler.load == 0
    go_on.set()
    slow.remove()


def test_numbers_that_are_none_are_500(served):
    made, app = served
    import torch

    with torch.no_grad():
        made.scheduler.generator.model.wte.weight.fill_(torch.nan)
    with client_of(app) as ask:
        body = {"model": "plain", "prompt": "a", "max_tokens": 3}
        answer = ask("POST", "/v1/completions", json=body)
        assert answer.status_code == 500 and "numbers" in answer.json()["error"]["message"]


def test_texts_that_it_never_holds_are_no_reason_to_try_again(tmp_path):
    weights_folder(tmp_path / "plain", CONFIG, "bytes")
    made = served_here(tmp_path / "plain", Limits(concurrent=2, queue=3))
    with client_of(build_app(made, "", [])) as ask:
        body = {"model": "plain", "prompt": "a", "max_tokens": 1}
        assert ask("POST", "/v1/completions", json={**body, "n": 5}).status_code == 200
        answer = ask("POST", "/v1/completions", json={**body, "n": 6})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].endswith("; 5 at most in a request")
    made.scheduler.close()


def test_limits_of_tokens(tmp_path):
    weights_folder(tmp_path / "plain", CONFIG, "bytes")
    made = served_here(tmp_path / "plain", Limits(prompt_tokens=9, new_tokens=5))
    with client_of(build_app(made, "", [])) as ask:
        for change, message in (
            ({"prompt": "a" * 9}, "prompt: 10 tokens; 9 at most here"),
            ({"max_tokens": 6}, "max_tokens = 6: 5 at most here"),
        ):
            body = {"model": "plain", "prompt": "a", "max_tokens": 2} | change
            answer = ask("POST", "/v1/completions", json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == message
    made.scheduler.close()


def test_the_command_line_takes_every_limit(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    options = [option_of(one) for one in fields(Limits)]
    assert all(f"{name} " in text for name in options)
    args = parse("x", *(word for name in options for word in (name, "7")))
    assert set(given(args, Limits).values()) == {7}


def test_a_cancelled_request_never_begins(served):
    made, _ = served

    async def both() -> None:
        text = Continuation([256], TextOptions(max_tokens=5))
        with made.scheduler.made([text]):
            pass
        await asyncio.sleep(0.2)
        assert made.scheduler.load == 0 and isinstance(made.scheduler.generator, Generator)

    asyncio.run(both())
    assert not made.scheduler.generator.busy

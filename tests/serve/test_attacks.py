"""What a hostile client sends: each has its status, and the server goes on."""

import contextlib
import json
import re
import socket
import time

import httpx2
import psutil
import pytest

from tests.lib.server import shared_server
from tests.serve.test_api import metrics

BASE = {"model": "tiny", "prompt": "a", "max_tokens": 2}


def send(content: bytes, path: str = "/v1/completions") -> httpx2.Response:
    return httpx2.post(shared_server().url + path, content=content, timeout=30)


BODIES = [
    ({"n": 10**6}, "n: 1000000 texts .n times prompts.; 64 at most"),
    ({"n": 10**30}, "field n = .*: Input should be a valid integer"),
    ({"n": 0}, "n = 0: must be 1 or more"),
    ({"prompt": ["a"] * 65}, "n: 65 texts"),
    ({"best_of": 5}, "best_of = 5: only n itself"),
    ({"max_tokens": -1}, "max_tokens = -1: must be 0 or more"),
    ({"max_tokens": 10**9}, "the model's context is 4096 tokens"),
    ({"max_tokens": 2.5}, "field max_tokens = 2.5"),
    ({"max_tokens": "9"}, "field max_tokens = '9'"),
    ({"temperature": -1}, "temperature = -1.0: must be 0 or more"),
    ({"temperature": 1e999}, "the body is no JSON"),
    ({"temperature": float("nan")}, "the body is no JSON"),
    ({"top_p": 0}, "top_p = 0.0: must be greater than 0"),
    ({"top_k": -1}, "top_k = -1"),
    ({"frequency_penalty": 3}, "frequency_penalty = 3.0: must be -2.0 to 2.0"),
    ({"logprobs": 21}, "logprobs = 21: must be 0 to 20"),
    ({"logprobs": -2}, "logprobs = -2"),
    ({"stop": [""]}, r'stop = \[""\]: must be without an empty text'),
    ({"stop": ["a"] * 17}, "stop: 17 texts; 16 at most"),
    ({"stop_token_ids": [261]}, "stop_token_ids: 261 is no token"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias: 1025 entries; 1024"),
    ({"logit_bias": {str(i): -100 for i in range(261)}}, "forbid all 261 tokens; leave one"),
    ({"stop_token_ids": [*range(256), *range(257, 261)], "min_tokens": 1}, "forbid all 261"),
    ({"stop_token_ids": [1] * 1025}, "stop_token_ids: 1025 entries; 1024 at most"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty = 1e-300: must be 0.001 to 1000"),
    ({"logit_bias": {"x": 1}}, "logit_bias: its keys must be token ids"),
    ({"logit_bias": {"999": 1}}, "logit_bias: 999 is no token"),
    ({"logit_bias": {"1": 1e6}}, "logit_bias = .*: must be of numbers from -100 to 100"),
    ({"prompt": [261]}, "prompt: 261 is no token; the vocabulary has 261, 0 to 260"),
    ({"prompt": [-1]}, "prompt: -1 is no token"),
    ({"prompt": []}, "prompt: an empty list"),
    ({"prompt": [[]]}, "prompt: an empty list"),
    ({"prompt": {"a": 1}}, "field prompt = .*: must be a text, a list of texts, of token ids, or"),
    ({"prompt": ["a", 1]}, "field prompt = "),
    ({"prompt": [[1], [True]]}, "field prompt = "),
    ({"prompt": "a" * 5000}, "but 5001 of the prompt and 2 of max_tokens are 5003"),
    ({"seed": 2**70}, "field seed"),
    ({"model": ["tiny"]}, "field model"),
    ({"suffix": "b"}, "suffix: the model cannot fill a gap"),
    ({"surprise": 1}, "unknown field surprise"),
]


@pytest.mark.parametrize(("change", "message"), BODIES, ids=lambda v: str(v)[:30])
def test_impossible_fields_are_named(change, message):
    answer = send(json.dumps(BASE | change).encode())
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error["message"]


def test_bodies_that_are_no_requests():
    deep = b"[" * 100_000 + b"]" * 100_000
    for content, message in (
        (b"", "the body is no JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"model": "tiny"}', "field prompt is missing"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "the body is no JSON"),
        (b'{"model": "tiny", "prompt": "\xff"}', "the body is no JSON"),
        (b'{"model": "tiny", "prompt": ' + deep + b"}", "the body is no JSON"),
        (json.dumps({**BASE, "logit_bias": {str(i): 1 for i in range(60_000)}}).encode(), "1024"),
    ):
        answer = send(content)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    for path, content in (("/tokenize", b"{}"), ("/detokenize", b'{"tokens": [999]}')):
        assert send(content, path).status_code == 400
    chat = {"model": "tiny", "messages": []}
    assert send(json.dumps(chat).encode(), "/v1/chat/completions").status_code == 400


def test_half_a_million_wrong_entries_are_one_error():
    """Not half a million of them, which took a gigabyte and ten seconds."""
    process = psutil.Process(shared_server().process.pid)
    before = process.memory_info().rss
    wrong = [
        {"prompt": [1] * 450_000 + ["a"]},
        {"stop_token_ids": ["a"] * 200_000},
        {"stop": [1] * 400_000},
        {f"field {number}": 1 for number in range(60_000)},
    ]
    for change in wrong:
        assert send(json.dumps(BASE | change, separators=(",", ":")).encode()).status_code == 400
    chat = {"model": "tiny", "messages": [{}] * 300_000}
    body = json.dumps(chat, separators=(",", ":")).encode()
    assert send(body, "/v1/chat/completions").status_code == 400
    assert process.memory_info().rss - before < 150e6


def test_a_body_that_is_too_large_is_413_and_never_held():
    body = json.dumps({**BASE, "logit_bias": {str(i): 1 for i in range(10**6)}}).encode()
    assert len(body) > 10_000_000
    answer = send(body)
    assert answer.status_code == 413 and "1048576 at most" in answer.json()["error"]["message"]

    def chunks():
        for _ in range(100):
            yield b" " * 100_000

    assert httpx2.post(shared_server().url + "/v1/completions", content=chunks()).status_code == 413


def test_too_many_texts_are_429():
    """The queue holds 128; each of these requests brings 60 that last."""
    body = {**BASE, "max_tokens": 3000, "n": 60, "stream": True, "ignore_eos": True}
    url = shared_server().url + "/v1/completions"
    with httpx2.Client(timeout=30) as client:
        with client.stream("POST", url, json=body), client.stream("POST", url, json=body):
            answer = client.post(url, json={**BASE, "n": 10})
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
            error = answer.json()["error"]
            assert error["code"] == "queue_full" and "it takes 128" in error["message"]
    settle()
    assert send(json.dumps(BASE).encode()).status_code == 200


def settle() -> None:
    t0 = time.monotonic()
    while metrics()["megagpt_texts_unfinished"]:
        assert time.monotonic() - t0 < 60, "texts are still being written"
        time.sleep(0.05)


def raw(content: bytes, wait_s: float) -> tuple[bytes, float]:
    """(the answer to these bytes, seconds until the connection ended)."""
    t0 = time.monotonic()
    with socket.create_connection(("127.0.0.1", shared_server().port), timeout=wait_s) as line:
        line.sendall(content)
        found = b""
        # Closed with bytes unread, a connection is reset, which may take the answer along.
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(65536):
                found += part
    return found, time.monotonic() - t0


def test_slow_clients_are_sent_away():
    """Three seconds are the limit of this server."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
    for content, status in ((b"", b""), (head, b""), (head + b"\r\n{", b"HTTP/1.1 408")):
        found, seconds = raw(content, 120)
        assert found.startswith(status) and bool(found) == bool(status)
        assert seconds > 2.5


def test_floods_and_nonsense_in_the_head():
    flood = b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(20_000))
    for content in (flood + b"\r\n", b"\x00\xff\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        found, _ = raw(content, 20)
        assert found.startswith(b"HTTP/1.1 400") or (content.startswith(flood) and not found)
    for path in ("/../../etc/passwd", "/v1/models/" + "x" * 3000, "/v1/models/..%2f"):
        assert httpx2.get(shared_server().url + path).status_code == 404
    assert httpx2.get(shared_server().url + "/v1/completions").status_code == 405


def test_other_pages_may_not_ask():
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx2.options(shared_server().url + "/v1/completions", headers=headers)
    assert "access-control-allow-origin" not in answer.headers
    # A page may send plain text without asking first, and give its own name this machine's address.
    url, own = shared_server().url, f"127.0.0.1:{shared_server().port}"
    for headers, status in (
        ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example:8000", "Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[x"}, 403),
        ({"Origin": f"http://{own}", "Host": own}, 200),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]"}, 200),
    ):
        answer = httpx2.post(url + "/v1/completions", json=BASE, headers=headers)
        assert answer.status_code == status, (headers, answer.text)
        if status == 403:
            told = answer.json()["error"]["message"]
            assert "may not ask here; start" in told or "is no name of this machine" in told

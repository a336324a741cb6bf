"""Chat and the server with a model that is shared out over two processes."""

import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from megagpt.checkpoint import load_model
from megagpt.cli import main
from megagpt.use.generate import generate
from megagpt.use.options import TextOptions
from tests.lib.distributed import ROOT, environment, free_port
from tests.lib.server import chat_folder


def launcher() -> list[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    return [*line, f"--master-port={free_port()}", "-m", "megagpt"]


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_one_process_has_nobody_to_share_with(command, tmp_path, capsys):
    folder = chat_folder(tmp_path)
    assert main([command, str(folder), "--split"]) == 2
    assert "--split: one process has nobody to share with; start it as" in capsys.readouterr().err


def test_two_ranks_talk_as_one(tmp_path):
    folder = chat_folder(tmp_path)
    words = ["chat", str(folder), "--seed", "3", "--max-tokens", "12"]
    said = "Hello\n/system Be brief.\nAnd you?\nAgain\n/exit\n"

    def told(line: list[str], *more: str) -> str:
        done = subprocess.run(
            [*line, *words, *more], input=said, cwd=ROOT, env=environment(), capture_output=True,
            text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        # DeepSpeed prints which accelerator it has found, before anything else.
        return re.sub(r"(?m)^\[20.*\n", "", done.stdout)

    alone = told([sys.executable, "-m", "megagpt"])
    assert len(alone) > 30 and "a new dialogue, instructed: Be brief." in alone
    assert told(launcher(), "--split") == alone


def test_two_ranks_serve_as_one(tmp_path):
    """Texts of several requests, one whose client leaves, a pause, and the end by a signal."""
    folder, log = chat_folder(tmp_path), tmp_path / "log"
    model, encoding, _ = load_model(folder)
    line = [*launcher(), "serve", str(folder), "--split", "--port", "0", "--name", "tiny"]
    with log.open("w") as file:
        process = subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=file, text=True)
    try:
        url = address(process, log)

        def asked(seed: int) -> str:
            body = {"model": "tiny", "prompt": f"text {seed}", "max_tokens": 20, "seed": seed}
            answer = httpx2.post(url + "/v1/completions", json=body, timeout=60)
            return answer.json()["choices"][0]["text"]

        def alone(seed: int) -> str:
            options = TextOptions(max_tokens=20, temperature=1.0, seed=seed)
            return "".join(generate(model, encoding, f"text {seed}", options))

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(asked, range(6))) == [alone(seed) for seed in range(6)]
        long = {"model": "tiny", "prompt": "a", "max_tokens": 3000, "stream": True}
        long["ignore_eos"] = True
        with httpx2.stream("POST", url + "/v1/completions", json=long, timeout=60) as answer:
            next(answer.iter_lines())
        time.sleep(1)
        assert "megagpt_texts_unfinished 0" in httpx2.get(url + "/metrics").text
        assert asked(7) == alone(7)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        assert "stopped" in log.read_text()
    finally:
        process.kill()


def address(process: "subprocess.Popen[str]", log: Path) -> str:
    """Where it listens, once it does."""
    deadline = time.monotonic() + 200
    while not (found := re.search(r"serving tiny at (http://[0-9.]+:\d+)", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return found[1]

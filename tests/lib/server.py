"""A real server in a process of its own, with a model that has tokens for turns."""

import atexit
import contextlib
import functools
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.portable import described
from megagpt.use.dialogue import with_turns
from tests.lib.distributed import ROOT, environment
from tests.lib.weights import banded, weights_folder

CONFIG = banded(n_ctx=4096, vocab_size=261, band_width=16)


@dataclass(frozen=True)
class RunningServer:
    """Where it listens, and its process."""

    port: int
    process: subprocess.Popen[str]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def chat_folder(folder: Path) -> Path:
    """Random weights whose tokenizer has the bytes, END-OF-DOCUMENT and the tokens for turns."""
    made = with_turns(load_tokenizer("bytes"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "turns.json").write_text(described(made), encoding="utf-8")
    weights_folder(folder / "weights", CONFIG, str(folder / "turns.json"))
    return folder / "weights"


@contextlib.contextmanager
def serving(folder: Path, log: Path, *options: str, poll_s: float = 0.1) -> Iterator[RunningServer]:
    """Starts `megagpt serve` and ends it; poll_s: seconds between looks whether it listens."""
    line = [sys.executable, "-m", "megagpt", "serve", str(folder), "--port", "0", *options]
    with log.open("w") as file:
        process = subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=file, text=True)
    try:
        found, deadline = None, time.monotonic() + 120
        while found is None:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            found = re.search(r"serving \S+ at http://[0-9.]+:(\d+)", log.read_text())
            time.sleep(poll_s)
        yield RunningServer(int(found[1]), process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()


@functools.cache
def shared_server() -> RunningServer:
    """One server for all tests of a process; its queue holds 120 texts."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="server-")))
    options = ("--name", "tiny", "--max-queue", "120", "--receive-s", "3", "--max-concurrent", "8")
    return stack.enter_context(serving(chat_folder(root), root / "log", *options))

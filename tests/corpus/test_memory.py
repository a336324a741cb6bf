"""Memory stays bounded on large input: a limit on every process (pytest -m slow -s).

MEGAGPT_TEST_GB=50 python -m pytest -m slow -s tests/corpus/test_memory.py -k stdin
"""

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from megagpt.corpus.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
GIGABYTES = float(os.environ.get("MEGAGPT_TEST_GB", "2"))
"""Size of the generated input. The shards take a bit less than half of it on the disk, and the
file of the test `file` all of it as well."""
LIMIT = 1 << 30
DOCUMENTS = 5000
"""In a block of the generated input."""


def limited() -> None:
    """Private memory of this process and of each child, in bytes."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def command(*inputs: object, output: Path) -> list[str]:
    script = str(ROOT / "data_prep/tokenize_corpus.py")
    return [sys.executable, script, *map(str, inputs), "--output", str(output), "--workers", "2"]


def blocks() -> Iterator[bytes]:
    """Lines of JSON without end: documents of 1.6 kB with words that no other one has."""
    words = "the quick brown fox jumps over the lazy dog and runs into a deep dark wood "
    line = json.dumps({"text": "########## " * 5 + words * 20}) + "\n"
    block = np.frombuffer((line * DOCUMENTS).encode(), np.uint8).copy()
    places = np.flatnonzero(block == ord("#"))
    draw = np.random.default_rng(0)
    while True:
        block[places] = draw.integers(97, 123, len(places), np.uint8)
        yield block.tobytes()


def watch(child: subprocess.Popen, peaks: dict[int, int]) -> None:
    """The largest resident size of a process and each of its children, shared pages included."""
    done = False
    while not done:
        done = child.poll() is not None
        try:
            parent = psutil.Process(child.pid)
            for each in [parent, *parent.children(recursive=True)]:
                peaks[each.pid] = max(peaks.get(each.pid, 0), each.memory_info().rss)
        except psutil.Error:
            pass
        threading.Event().wait(0.2)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("place", ["file", "stdin"])
def test_an_input_of_any_size_fits_into_a_gigabyte(tmp_path: Path, place: str) -> None:
    size = count = 0
    path = tmp_path / "in.jsonl"
    if place == "file":
        with path.open("wb") as file:
            for block in blocks():
                size, count = size + file.write(block), count + DOCUMENTS
                if size >= GIGABYTES * 1e9:
                    break
    child = subprocess.Popen(
        command(path if place == "file" else "-", output=tmp_path / "out"),
        env=ENV,
        stdin=subprocess.PIPE,
        preexec_fn=limited,
    )
    peaks: dict[int, int] = {}
    watcher = threading.Thread(target=watch, args=(child, peaks))
    watcher.start()
    assert child.stdin is not None
    if place == "stdin":
        for block in blocks():
            size, count = size + child.stdin.write(block), count + DOCUMENTS
            if size >= GIGABYTES * 1e9:
                break
    child.stdin.close()
    assert child.wait() == 0
    watcher.join()
    assert read_manifest(tmp_path / "out").documents == count
    print(f"{place}: {size / 1e9:.1f} GB, peaks in MB {[round(p / 1e6) for p in peaks.values()]}")
    assert len(peaks) == 3 and max(peaks.values()) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_document_of_100_megabytes(tmp_path: Path, ending: str) -> None:
    text = "All the world's a stage, and all the men and women merely players. " * 1_500_000
    path = tmp_path / f"in.{ending}"
    path.write_text(text if ending == "txt" else json.dumps({"text": text}) + "\n")
    result = subprocess.run(
        command(path, output=tmp_path / "out"), env=ENV, preexec_fn=limited, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.documents, manifest.totals["text_bytes"]) == (1, len(text))

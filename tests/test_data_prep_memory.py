"""Memory stays bounded on large input: a limit on every process (pytest -m slow)."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.data.manifest import read_manifest

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
GIGABYTES = float(os.environ.get("MEGAGPT_TEST_GB", "2"))
"""Size of the generated input; 50 takes half an hour."""
LIMIT = 1 << 30


def limited() -> None:
    """Private memory of this process and of each child, in bytes."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def command(*inputs: object, output: Path) -> list[str]:
    script = str(ROOT / "data_prep/tokenize_corpus.py")
    return [sys.executable, script, *map(str, inputs), "--output", str(output), "--workers", "2"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("place", ["file", "stdin"])
def test_an_input_of_any_size_fits_into_a_gigabyte(tmp_path: Path, place: str) -> None:
    words = "the quick brown fox jumps over the lazy dog and runs into a deep dark wood "
    block = "".join(json.dumps({"text": f"{n} {words * 20}"}) + "\n" for n in range(5000)).encode()
    blocks = int(GIGABYTES * 1e9 / len(block)) + 1
    path = tmp_path / "in.jsonl"
    if place == "file":
        with path.open("wb") as file:
            for _ in range(blocks):
                file.write(block)
        child = subprocess.Popen(
            command(path, output=tmp_path / "out"), env=ENV, preexec_fn=limited
        )
    else:
        child = subprocess.Popen(
            command("-", output=tmp_path / "out"),
            env=ENV,
            stdin=subprocess.PIPE,
            preexec_fn=limited,
        )
        assert child.stdin is not None
        for _ in range(blocks):
            child.stdin.write(block)
        child.stdin.close()
    assert child.wait() == 0
    assert read_manifest(tmp_path / "out").documents == 5000 * blocks


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

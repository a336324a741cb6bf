"""The examples in short: each runs by its one command, and its last line is its figure."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt.corpus.verify import verify_shards
from tests.lib.corpus import sentences
from tests.lib.distributed import ROOT, digest_of_weights, environment, kill_all, steps
from tests.lib.distributed import wait_for_step as wait


def line(name: str, *words: object) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / name), *map(str, words)]


def run(root: Path, name: str, *words: object) -> str:
    """An example to its end in a folder of its own; the last line of its stdout."""
    done = subprocess.run(
        line(name, *words), cwd=root, env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_adder(tmp_path: Path) -> None:
    words = ["adder.py", "--digits", 1, "--steps", 150]
    figure = run(tmp_path, *words)
    right = int(re.fullmatch(r"test: (\d+) of 20", figure)[1])
    assert right >= 4, "a guess among the 19 sums is right once in 20 problems"
    for split, count in (("", 80), ("-validation", 20)):
        folder = tmp_path / f"data/adder-1{split}"
        assert verify_shards(folder) == []
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["totals"]["documents"] == count and manifest["records"] == {"length": 4}
    assert run(tmp_path, *words) == figure, "a run that is done says the same again"


def test_sort_on_two_ranks_by_deepspeed(tmp_path: Path) -> None:
    figure = run(tmp_path, "sort.py", "--steps", 40, "--ranks", 2)
    assert re.fullmatch(r"test: \d+ of 193", figure)
    losses = [record["loss"] for record in steps(tmp_path / "runs/sort")]
    assert len(losses) == 40 and losses[-1] < 0.6 * losses[0]


def test_chargpt_on_a_text_of_ones_own(tmp_path: Path) -> None:
    text = "".join(sentences(400, 1)).replace("the", "thé")  # two bytes are one character
    (tmp_path / "my.txt").write_text(text)
    words = ["--text", "my.txt", "--data", "data/mine", "--steps", 40, "--model", "nano"]
    figure = run(tmp_path, "chargpt.py", *words)
    found = re.fullmatch(r"([\d.]+) nats per character of data/mine-validation", figure)
    held_out = text[len(text) - len(text) // 10 :]
    assert found and len(held_out.encode()) > len(held_out)
    assert 1.0 < float(found[1]) < 4.0, "the entropy of 257 ids is 5.5"


@pytest.mark.slow
def test_an_example_goes_on_after_kill_9(tmp_path: Path) -> None:
    words = ["adder.py", "--digits", 1, "--steps", 400]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    figure = run(tmp_path / "whole", *words)
    process = subprocess.Popen(
        line(*words), cwd=tmp_path / "killed", env=environment(), start_new_session=True, text=True
    )
    wait(tmp_path / "killed/runs/adder-1", 100)
    time.sleep(0.5)
    kill_all(process)
    process.wait()
    assert run(tmp_path / "killed", *words) == figure
    runs = [tmp_path / name / "runs/adder-1" for name in ("whole", "killed")]
    assert digest_of_weights(runs[0]) == digest_of_weights(runs[1])

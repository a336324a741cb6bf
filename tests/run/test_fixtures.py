"""Shards, runs and weights made before the redesign still open, verify and go on as they would.

The fixture's own code continued it on two ranks; this code has to come to the same. On the machine
that made the fixture that holds bit for bit (MEGAGPT_SAME_MACHINE=1 asks for it); another CPU's
kernels round differently.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.lib.distributed import ROOT, command, environment

FIXTURE = ROOT / "tests" / "fixtures" / "before_redesign"
EXACT = bool(os.environ.get("MEGAGPT_SAME_MACHINE"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The fixture in a folder of its own; commands run there, its paths are relative."""
    folder = tmp_path / "copy"
    shutil.copytree(FIXTURE, folder)
    return folder


def run_in(folder: Path, line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120
    )


def megagpt(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_in(folder, [sys.executable, "-m", "megagpt", *arguments])


def test_everything_verifies(copy):
    for line in ("data verify corpus", "data verify corpus-validation", "checkpoint verify run"):
        done = megagpt(copy, *line.split())
        assert done.returncode == 0, (line, done.stderr)


def test_old_weights_generate(copy):
    done = megagpt(copy, "generate", "weights", "--prompt", "the model", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the model")


def test_a_stopped_run_goes_on_to_the_same_end(copy):
    done = run_in(copy, command(Path("run.toml"), 2))
    assert done.returncode == 0, done.stderr
    expected = json.loads((FIXTURE / "continued.json").read_text())
    records = [json.loads(line) for line in (copy / "run/metrics.jsonl").read_text().splitlines()]
    steps = {str(r["step"]): r for r in records if "loss" in r and r["step"] > 18}
    assert steps.keys() == expected["losses"].keys()
    tolerance = 0.0 if EXACT else 1e-5
    for step, (loss, norm, digest) in expected["losses"].items():
        assert steps[step]["digest"] == digest
        assert steps[step]["loss"] == pytest.approx(loss, rel=tolerance, abs=0)
        assert steps[step]["grad_norm"] == pytest.approx(norm, rel=10 * tolerance, abs=0)
    for path in sorted((FIXTURE / "end").glob("*.safetensors")):
        ours = load_file(copy / "run/checkpoints/step_00000027" / path.name)
        theirs = load_file(path)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance)

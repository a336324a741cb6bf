"""The package as `pip install .` leaves it, away from the checkout.

The wheel is built from a copy of the repository's files and unpacked into a folder that comes
first on the path; commands run in an empty folder, so that nothing of the checkout can be met.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.log.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("megagpt", "ds_configs", "launch", "data_prep")
RUN = """
model = "gpt3-125m"
output = "run"

[model]
n_layer = 2
n_head = 2
d_model = 32
n_ctx = 32
vocab_size = 257
attention = ["dense"]

[data]
train = [{ path = "corpus" }]

[schedule]
total_tokens = 1280
warmup_tokens = 256
decay_tokens = 0
batch_tokens = 128
ramp_start_tokens = 0
ramp_tokens = 0

[parallel]
dtype = "fp32"

[log]
tensorboard = false
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in BUILT_FROM:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-compile")
    pip(*options, "--target", str(target), str(source))
    # What could still be found by accident.
    shutil.rmtree(source)
    return target


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def call(installed: Path, folder: Path, *arguments: str) -> str:
    """What a module of the installed package prints, run in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_lies_beside_the_package_travels_with_it(installed):
    """Every tracked file of these folders is there, byte for byte."""
    command = ["git", "ls-files", *BUILT_FROM]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.split():
        inside = installed / name if name.startswith("megagpt/") else installed / "megagpt" / name
        assert inside.read_bytes() == (ROOT / name).read_bytes(), name


def test_a_run_is_planned_away_from_the_checkout(installed, tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    assert "ZeRO stage 1" in call(installed, tmp_path, "megagpt", "plan", "run.toml")
    where = "import megagpt.files as f; print(f.__file__, f.shipped('launch'))"
    (tmp_path / "where.py").write_text(where)
    expected = f"{installed}/megagpt/files.py {installed}/megagpt/launch"
    assert call(installed, tmp_path, "where").strip() == expected


def test_a_job_is_written_away_from_the_checkout(installed, tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    size = ("--nodes", "1", "--gpus-per-node", "1", "--time", "1:00:00")
    call(installed, tmp_path, "megagpt", "launch", "slurm", "run.toml", *size)
    last = (tmp_path / "run/job.sbatch").read_text().splitlines()[-3::2]
    assert f"MEGAGPT_LAUNCH={installed}/megagpt/launch" in last[0]
    assert (installed / "megagpt/launch/slurm.sbatch").exists()
    assert last[1] == '. "$MEGAGPT_LAUNCH/slurm.sbatch"'


@pytest.mark.slow
def test_a_run_is_prepared_and_trained_away_from_the_checkout(installed, tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "text.txt").write_text("All happy families are alike. " * 200)
    options = ("--output", "corpus", "--tokenizer", "bytes", "--workers", "1")
    call(installed, tmp_path, "megagpt.data_prep.tokenize_corpus", "text.txt", *options)
    call(installed, tmp_path, "megagpt.train", "run.toml")
    steps = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert [step["step"] for step in steps] == list(range(1, 11))

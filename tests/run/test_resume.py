"""Killed in the middle and run again, a run is the run that was never killed, bit for bit."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints
from megagpt.config import load_run
from megagpt.log import read_metrics
from tests.lib.distributed import (
    digest_of_weights,
    exact,
    finish,
    kill_all,
    launch,
    start,
    steps,
    undisturbed,
    wait_for_step,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The undisturbed run's file for a run folder that is still empty."""
    root = undisturbed()
    text = (root / "run.toml").read_text()
    path = tmp_path / "run.toml"
    path.write_text(text.replace(f'output = "{root}/run"', f'output = "{tmp_path}/run"'))
    return path


def validation(run: Path) -> list[tuple[int, float]]:
    records = read_metrics(run)
    return [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]


def test_killed_and_run_again_is_the_same_run(file, tmp_path):
    run, expected = tmp_path / "run", undisturbed() / "run"
    total = load_run(file).schedule.n_steps
    process = start(file, 2)
    wait_for_step(run, 14)
    kill_all(process)
    assert finish(process).returncode == -signal.SIGKILL
    assert 14 <= len(steps(run)) < total, "it was killed too late"
    # Part of the work is lost, and so done twice.
    assert list_checkpoints(run)
    done = launch(file, 2)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stderr
    assert exact(steps(run)) == exact(steps(expected))
    assert len(steps(run)) == total
    assert validation(run) == validation(expected)
    assert digest_of_weights(run) == digest_of_weights(expected)
    events = [r for r in read_metrics(run) if r.get("event") == "resume"]
    assert len(events) == 1 and events[0]["lost_steps"] > 0


def test_a_finished_run_says_so(file, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed() / "run", run)
    before = exact(steps(run)), digest_of_weights(run), list_checkpoints(run)
    done = launch(file, 1, launcher="python")
    assert done.returncode == 0, done.stderr
    assert "run complete: 15,360 tokens in 27 steps" in done.stdout
    assert "validation loss: " in done.stdout and str(run) in done.stdout
    assert (exact(steps(run)), digest_of_weights(run), list_checkpoints(run)) == before


def test_what_stands_in_the_run_folder(file):
    run = undisturbed() / "run"
    assert load_run(run / "config.toml") == load_run(undisturbed() / "run.toml")
    assert json.loads((run / "ds_config.json").read_text())["zero_optimization"]["stage"] == 1
    facts = json.loads((run / "run.json").read_text())
    assert facts["steps"] == 27 and facts["layout"] == "2 ranks = data 2"
    assert {"megagpt", "torch", "deepspeed", "python"} <= facts["versions"].keys()
    assert list((run / "tensorboard").iterdir())
    schedule = load_run(undisturbed() / "run.toml").schedule
    tokens = 0
    for record in steps(run):
        # The ramp is the schedule's and nothing is read twice or left out.
        assert record["batch_tokens"] == schedule.batch(tokens)
        tokens += record["batch_tokens"]
        assert (record["tokens"], record["samples"]) == (tokens, tokens // 32)
        assert record["lr"] == schedule.lr(tokens)
    assert len({record["digest"] for record in steps(run)}) == 27
    losses = [loss for _, loss in validation(run)]
    # ln 257 = 5.549: an untrained model knows nothing; a trained one knows English letters.
    assert abs(losses[0] - 5.549) < 0.05 and losses[-1] < 3.5

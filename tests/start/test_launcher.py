"""`megagpt train`: what is wrong is said before a rank starts; then the ranks train."""

import os
import subprocess
import sys

import pytest

from megagpt.cli import main
from megagpt.config import load_run
from megagpt.errors import UsageError
from megagpt.log import read_metrics
from megagpt.start.launcher import command_line, ranks_of, visible_gpus
from tests.lib.corpus import sentences, write_corpus
from tests.lib.distributed import environment

RUN = """
output = "runs/x"
data.train = [{path = "data/mine"}]
schedule = {total_tokens = 512, peak_lr = 1e-3, batch_tokens = 128}
parallel.dtype = "fp32"
[model]
n_layer = 1
n_head = 2
d_model = 16
n_ctx = 16
vocab_size = 257
"""


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "data/mine", sentences(100, 1))
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def train(folder, *words):
    """megagpt train as a user runs it."""
    command = [sys.executable, "-m", "megagpt", "train", "run.toml", *words]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule.peak_lrr=1"], "unknown key 'schedule.peak_lrr' (did you mean 'peak_lr'?)"),
        (["--ranks", "3"], "must be a multiple of the 3 data ranks"),
        (["--ranks", "-1"], "--ranks -1: must be 1 or more"),
        (["data.train=[{path='data/none'}]"], "data/none does not exist"),
        (["model.vocab_size=300"], "set model.vocab_size = 257"),
        (["data.validation=[{path='data/no'}]"], "data/no does not exist"),
    ],
)
def test_what_is_wrong_is_said_at_once(run_file, words, message, capsys):
    assert main(["train", "run.toml", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (run_file.parent / "runs").exists()


def test_a_corpus_that_is_not_there_is_made_by_the_commands_of_the_run_file(run_file, capsys):
    head = "# Data     python data_prep/text8.py --output data/none     (by hand)\n# Train    x\n"
    run_file.write_text(head + RUN)
    assert main(["train", "run.toml", "data.train=[{path='data/none'}]"]) == 2
    told = capsys.readouterr().err
    assert told.endswith("; run.toml says how:\n  python data_prep/text8.py --output data/none\n")
    # It says nothing of another corpus, nor where the corpus is there.
    for words in (["data.train=[{path='data/no'}]"], ["model.vocab_size=300"]):
        assert main(["train", "run.toml", *words]) == 2
        assert "says how" not in capsys.readouterr().err


def test_one_process_trains(run_file):
    done = train(run_file.parent)
    assert done.returncode == 0, done.stderr
    assert "1 rank, run folder runs/x" in done.stdout and "run complete" in done.stdout
    assert "note: data/mine is read" in done.stdout
    assert "next: megagpt generate runs/x --prompt TEXT" in done.stdout
    assert "set schedule.decay_tokens = 512 to keep the learning rate low" in done.stdout
    # Again: what it reached is said; no rank starts, and nothing is booked as a pause.
    before = (run_file.parent / "runs/x/metrics.jsonl").read_bytes()
    again = train(run_file.parent)
    assert again.returncode == 0 and "run complete" in again.stdout
    assert "1 rank" not in again.stdout
    assert (run_file.parent / "runs/x/metrics.jsonl").read_bytes() == before
    # With another recipe or other data it is another run, which its place does not hold.
    write_corpus(run_file.parent / "data/other", sentences(100, 2))
    for change, word in (
        ("schedule.peak_lr=2e-3", "schedule.peak_lr: "),
        ("data.train=[{path='data/other'}]", "data: other shards"),
    ):
        other = train(run_file.parent, change)
        assert other.returncode == 2 and word in other.stderr and "run complete" not in other.stdout
    assert (run_file.parent / "runs/x/metrics.jsonl").read_bytes() == before
    # Longer: what that does to the learning rate is said first.
    longer = ["schedule.total_tokens=1024"]
    refused = train(run_file.parent, *longer)
    assert refused.returncode == 2
    assert "learning rate at 512 tokens: 0.0001 -> 0.00055" in refused.stderr
    assert "schedule.decay_tokens=512 keeps it low" in refused.stderr
    kept = train(run_file.parent, *longer, "schedule.decay_tokens=512", "--allow-changes")
    assert kept.returncode == 0 and "learning rate at" not in kept.stderr
    events = [line for line in read_metrics(run_file.parent / "runs/x") if "event" in line]
    told = [event["event"] for event in events if event["event"] != "checkpoint"]
    assert told == ["start", "complete", "resume", "complete"]
    [extension] = [event for event in events if event["event"] == "resume"]
    assert extension["down_s"] == 0.0 and extension["paused_s"] > 0


@pytest.mark.slow
def test_two_ranks_train_without_a_word_of_the_launcher(run_file):
    for launcher in ("deepspeed", "torchrun"):
        words = ["--ranks", "2", "--launcher", launcher, f"output=runs/{launcher}"]
        done = train(run_file.parent, *words)
        assert done.returncode == 0, done.stderr
        assert f"2 ranks, run folder runs/{launcher}" in done.stdout
        assert "INFO" not in done.stdout + done.stderr


def test_launchers(monkeypatch):
    words = ["run.toml", "seed=1"]
    assert command_line(words, 1, "deepspeed") == [sys.executable, "-m", "megagpt.train", *words]
    line = command_line(words, 4, "torchrun")
    assert "--nproc-per-node=4" in line and line[-3:] == ["megagpt.train", *words]
    line = command_line(words, 4, "deepspeed")
    assert line[2:4] == ["--num_gpus", "4"] and line[-3:] == ["megagpt.train", *words]
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="deepspeed's launcher is not installed; use --launcher"):
        command_line(words, 4, "deepspeed")


def test_ranks_are_the_gpus_that_can_be_seen(run_file, monkeypatch, tmp_path):
    config = load_run(run_file)
    assert ranks_of(0, config, 0) == 1 and ranks_of(0, config, 8) == 8
    assert ranks_of(2, config, 8) == 2 and ranks_of(4, config, 0) == 4
    with pytest.raises(UsageError, match="--ranks 9: this machine shows 8 GPUs"):
        ranks_of(9, config, 8)
    split = load_run(run_file, ["parallel.pipeline=2", "parallel.tensor=2"])
    assert ranks_of(0, split, 0) == 4
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559, 0'\necho 'NVIDIA H100, 81559, 0'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert visible_gpus({}) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}) == ["1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []

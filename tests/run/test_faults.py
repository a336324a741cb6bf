"""Faults of a run as its launcher sees them: exit codes, messages, and nothing lost."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints, verify
from megagpt.config import load_run
from tests.lib.campaign import Campaign, prepare
from tests.lib.corpus import run_file
from tests.lib.distributed import (
    descendants,
    finish,
    launch,
    run_together,
    start,
    steps,
    undisturbed,
    wait_for_end,
    wait_for_step,
    workers,
)

ENDLESS = ("schedule.total_tokens=9e9", "checkpoint.every_tokens=0", "log.every_steps=1000")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run file whose run folder holds one checkpoint, of the first half of the run."""
    root = undisturbed()
    first = list_checkpoints(root / "run")[0]
    shutil.copytree(first, tmp_path / "run" / "checkpoints" / first.name)
    path = tmp_path / "run.toml"
    text = (root / "run.toml").read_text()
    path.write_text(text.replace(f'output = "{root}/run"', f'output = "{tmp_path}/run"'))
    return path


# --- wrong input --------------------------------------------------------------------------------


def test_an_unknown_key_is_exit_code_2_before_anything_starts(tmp_path):
    file = run_file(tmp_path)
    for override, message in (
        ("modle=x", "unknown key 'modle' (did you mean 'model'?)"),
        ("parallel.tensor=2", "1 ranks: must be a positive multiple of pipeline x tensor"),
    ):
        # In a process of its own: training leaves the process group that it ends in.
        done = launch(file, 1, override, launcher="python")
        assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_deepspeed_launcher_hands_exit_code_2_on(tmp_path):
    done = launch(run_file(tmp_path), 2, "modle=x", launcher="deepspeed")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("unknown key 'modle' (did you mean 'model'?)") == 1
    assert "Traceback" not in done.stderr


def test_a_missing_data_folder_is_named(tmp_path):
    file = run_file(tmp_path)
    shutil.rmtree(tmp_path / "validation")
    done = launch(file, 1, launcher="python")
    assert done.returncode == 2, done.stderr
    assert f"megagpt: {tmp_path}/validation does not exist; prepare a corpus" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = launch(run_file(tmp_path), 1, f"output={tmp_path}/file/run", launcher="python")
    assert done.returncode == 2, done.stderr
    assert "file/run': cannot make the run folder (Not a directory)" in done.stderr


def test_a_flipped_byte_in_a_shard_is_never_trained_on(tmp_path):
    file = run_file(tmp_path)
    shard = sorted((tmp_path / "train").glob("*.bin"))[-1]
    flip(shard)
    done = launch(file, 2)
    # torchrun knows no code but 1; the ranks' own is in its report.
    assert done.returncode == 1 and "exitcode  : 3" in done.stderr, done.stderr
    assert done.stderr.count(f"{shard}: sha256 ") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_flipped_byte_in_the_only_checkpoint_is_exit_code_3(begun, tmp_path):
    (folder,) = list_checkpoints(tmp_path / "run")
    flip(folder / "rank_00001.safetensors")
    done = launch(begun, 2, launcher="deepspeed")
    assert done.returncode == 3, done.stderr
    assert "rank_00001.safetensors: its checksum is not the manifest's" in done.stderr
    assert "no checkpoint is whole" in done.stderr and "restore one from a copy" in done.stderr
    # Nothing lost, nothing trained over it.
    assert list_checkpoints(tmp_path / "run") == [folder]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_run_leaves_the_folder_as_it_is(begun, tmp_path):
    done = launch(begun, 1, "schedule.peak_lr=1e-3", "seed=9", launcher="python")
    assert done.returncode == 2, done.stderr
    for line in ("seed: 1 -> 9", "schedule.peak_lr: 0.003 -> 0.001", "data: other shards"):
        assert line in done.stderr
    assert not (tmp_path / "run" / "config.toml").exists()


# --- asked to stop ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_ends_with_75(tmp_path, number):
    process = start(run_file(tmp_path), 1, *ENDLESS, launcher="python")
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(number)
    done = finish(process)
    assert done.returncode == 75, done.stderr
    last = steps(tmp_path / "run")[-1]["step"]
    assert f"stopped by {number.name} at step {last}, saved; run the same command" in done.stderr
    (folder,) = list_checkpoints(tmp_path / "run")
    assert folder.name == f"step_{last:08d}" and verify(folder) == []


def stopped(tmp_path: Path, launcher: str, number: signal.Signals, to: str) -> int:
    """The launcher's exit code after a signal; the checkpoint must be there."""
    process = start(run_file(tmp_path), 2, *ENDLESS, launcher=launcher)
    wait_for_step(tmp_path / "run", 3)
    if to == "launcher":
        process.send_signal(number)
    elif to == "rank":
        os.kill(workers(process)[1], number)
    else:
        os.killpg(process.pid, number)
    code = finish(process).returncode
    (folder,) = list_checkpoints(tmp_path / "run")
    assert verify(folder) == []
    assert folder.name == f"step_{steps(tmp_path / 'run')[-1]['step']:08d}"
    return code


def test_deepspeed_hands_75_on_when_one_rank_is_asked_to_stop(tmp_path):
    assert stopped(tmp_path, "deepspeed", signal.SIGTERM, "rank") == 75


@pytest.mark.slow
def test_torchrun_passes_the_signal_on_and_ends_with_1(tmp_path):
    assert stopped(tmp_path, "torchrun", signal.SIGTERM, "launcher") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "code"),
    [
        # What a terminal's Ctrl-C and a batch system's end of time do: the whole group.
        ("deepspeed", signal.SIGINT, -signal.SIGINT),
        ("deepspeed", signal.SIGTERM, -signal.SIGTERM),
        ("torchrun", signal.SIGINT, 1),
        ("torchrun", signal.SIGTERM, 1),
    ],
)
def test_a_signal_to_all_saves_under_every_launcher(tmp_path, launcher, number, code):
    assert stopped(tmp_path, launcher, number, "group") == code


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_that_lose_their_launcher_save_and_end(tmp_path, launcher, number):
    process = start(run_file(tmp_path), 2, *ENDLESS, launcher=launcher)
    wait_for_step(tmp_path / "run", 3)
    ranks = workers(process)
    process.send_signal(number)
    finish(process)
    wait_for_end(ranks, "outlived their launcher")
    (folder,) = list_checkpoints(tmp_path / "run")
    assert verify(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_whose_launcher_dies_while_they_start_end_too(tmp_path, launcher):
    process = start(run_file(tmp_path), 2, *ENDLESS, launcher=launcher)
    while len(ranks := workers(process)) < 2:
        time.sleep(0.01)
    time.sleep(0.2)
    above = [pid for pid in descendants(process) if pid not in ranks]
    for pid in [*above, process.pid]:
        os.kill(pid, signal.SIGKILL)
    wait_for_end(ranks, "wait for a launcher that is dead")
    assert "rank 0: the launcher died while this rank started; run" in finish(process).stderr


# --- a rank dies --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_one_dead_rank_ends_all(tmp_path, launcher):
    process = start(run_file(tmp_path), 2, *ENDLESS, launcher=launcher)
    wait_for_step(tmp_path / "run", 3)
    ranks = workers(process)
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    assert finish(process).returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
def test_a_short_campaign(tmp_path):
    # The long one: python -m tests.lib.campaign; its figures are in what-was-measured.md.
    broken, whole = prepare(tmp_path, total_tokens=40_000, every_tokens=2048)
    assert launch(whole, 2).returncode == 0
    campaign = Campaign(broken, tmp_path / "run", 2, "torchrun", random.Random(3))
    campaign.round("saving", "rank")
    campaign.round("training", "launcher")
    campaign.compare()
    figures = campaign.figures
    assert figures.same_steps and figures.same_weights, figures
    assert figures.kills == 2 and figures.steps == len(steps(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills(tmp_path):
    words = ["--kills", "20", "--total-tokens", "700000", "--output", str(tmp_path / "campaign")]
    done = run_together([sys.executable, "-m", "tests.lib.campaign", *words], timeout_s=3500)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["kills"] == 20 and figures["same_steps"] and figures["same_weights"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_power_cuts(tmp_path):
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4")
    words = ["--cuts", "4", "--total-tokens", "150000", "--output", str(tmp_path / "campaign")]
    done = run_together([sys.executable, "-m", "tests.lib.power_cuts", *words], timeout_s=1700)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["cuts"] >= 3 and figures["damaged"] == 0
    # What was not flushed was lost, or nothing was tried.
    assert figures["lines_lost"] > 0


# --- a full disk --------------------------------------------------------------------------------


def limit_files() -> None:
    """No file may grow beyond 100,000 bytes: a rank's part of a checkpoint is about 400,000."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_disk_that_fills_up_in_the_middle_of_a_save_stops_the_run(begun, tmp_path):
    (folder,) = list_checkpoints(tmp_path / "run")
    done = finish(start(begun, 1, launcher="python", preexec_fn=limit_files))
    assert done.returncode == 3, done.stderr
    assert "checkpoint not saved: " in done.stderr and "File too large" in done.stderr
    assert "the checkpoints before it are whole; make space and run again" in done.stderr
    assert "Traceback" not in done.stderr
    assert list_checkpoints(tmp_path / "run") == [folder] and verify(folder) == []
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


def test_training_may_go_on_without_its_checkpoints(begun, tmp_path):
    (folder,) = list_checkpoints(tmp_path / "run")
    carry_on = "checkpoint.on_failure=continue"
    done = finish(start(begun, 1, carry_on, launcher="python", preexec_fn=limit_files))
    assert done.stderr.count("training goes on") > 1
    # To the end of the run; but a run whose end is not saved is not done.
    assert done.returncode == 3, done.stderr
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert f'"step": {load_run(begun).schedule.n_steps},' in text
    assert "run complete" not in done.stdout
    assert list_checkpoints(tmp_path / "run") == [folder] and verify(folder) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.1 MB: three checkpoints of the tiny model do not fit."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_file_system_is_seen_before_it_is_written_to(tmp_path, small_disk):
    file = run_file(tmp_path)
    done = launch(file, 2, f"output={small_disk}/run", "log.tensorboard=false")
    assert "exitcode  : 3" in done.stderr, done.stderr
    assert "bytes are needed and" in done.stderr and "are free" in done.stderr
    folders = list_checkpoints(small_disk / "run")
    assert folders and all(verify(folder) == [] for folder in folders)
    # With room for one more it goes on, and to the end.
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    done = launch(file, 2, f"output={small_disk}/run", "log.tensorboard=false")
    assert done.returncode == 0 and "run complete" in done.stdout, done.stderr
    assert len(steps(small_disk / "run")) == load_run(file).schedule.n_steps


@pytest.mark.slow
def test_a_disk_without_room_for_a_line_of_metrics(tmp_path, small_disk):
    file = run_file(tmp_path)
    run = small_disk / "run"
    process = start(file, 1, f"output={run}", *ENDLESS, "log.tensorboard=false", launcher="python")
    wait_for_step(run, 3)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 4096):
                pass
        except OSError:
            pass
    done = finish(process)
    assert done.returncode == 3, done.stderr
    assert "No space left on device; the checkpoints that were saved are whole" in done.stderr
    assert "Traceback" not in done.stderr

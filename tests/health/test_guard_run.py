"""The guards in real trainings: time limit, hung rank, dead launcher, flipped bit, a spike."""

import dataclasses
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt.check.resume import compare
from megagpt.checkpoint import list_checkpoints, record
from megagpt.checkpoint.slice_file import FileRecord
from megagpt.cli import main
from megagpt.log import read_metrics
from tests.lib.corpus import run_file
from tests.lib.distributed import (
    digest_of_weights,
    exact,
    finish,
    free_port,
    launch,
    run_together,
    start,
    steps,
    wait_for_end,
    wait_for_step,
    workers,
)
from tests.lib.noise import FAST, SKIPS, SPIKES, journal, with_noise

ENDLESS = {"total_tokens": 10_000_000, "decay_tokens": 9_000_000}


def torchrun(ranks: int, *words: str) -> list[str]:
    place = [f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    return [sys.executable, "-m", "torch.distributed.run", *place, "-m", *words]


# --- stops --------------------------------------------------------------------------------------


def test_the_time_limit_ends_a_run_that_has_no_other_end(tmp_path: Path):
    file = run_file(tmp_path, schedule=ENDLESS)
    done = launch(file, 1, "checkpoint.stop_after_minutes=0.3", launcher="python")
    assert done.returncode == 75, done.stderr
    assert "stopped by the time limit (checkpoint.stop_after_minutes) at step" in done.stderr
    newest = record.read_record(list_checkpoints(tmp_path / "run")[-1])
    assert newest.step == len(steps(tmp_path / "run")) > 0


@pytest.mark.parametrize(
    "parallel",
    [
        {"ds_config": "zero1"},
        pytest.param({"ds_config": "pipeline", "pipeline": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_hung_rank_ends_the_job_with_stacks(tmp_path: Path, parallel: dict[str, object]):
    file = run_file(tmp_path, schedule=ENDLESS, parallel=parallel)
    process = start(file, 2, "log.watchdog_minutes=0.1")
    wait_for_step(tmp_path / "run", 3)
    hung = workers(process)[1]
    os.kill(hung, signal.SIGSTOP)
    t0 = time.monotonic()
    try:
        until = t0 + 60
        stacks = tmp_path / "run" / "stacks"
        while not list(stacks.glob("rank_*.txt")) and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1)
        text = "".join(p.read_text() for p in stacks.glob("rank_*.txt"))
        # The main thread hangs in a step, between two of them, or in a save, which has longer.
        assert re.search(r"within 0\.[14] minutes", text) and re.search(
            r'loop\.py", line \d+ in run\n', text
        )
    finally:
        os.kill(hung, signal.SIGCONT)
    done = finish(process, timeout_s=90)
    assert done.returncode == 1
    assert "(log.watchdog_minutes); its stacks: " in done.stderr
    # The rank that waited for the other tells in which collective.
    told = pickle.loads((stacks / "collectives_0").read_bytes())
    assert told["entries"][-1]["profiling_name"].startswith("gloo:")


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)]
)
def test_ranks_without_their_launcher_end(tmp_path: Path, launcher: str):
    process = start(run_file(tmp_path, schedule=ENDLESS), 2, launcher=launcher)
    wait_for_step(tmp_path / "run", 3)
    ranks = workers(process)
    assert len(ranks) == 2
    process.kill()
    wait_for_end(ranks, "outlived their launcher")
    finish(process)
    # They saved where they were.
    newest = record.read_record(list_checkpoints(tmp_path / "run")[-1])
    assert newest.step == len(steps(tmp_path / "run"))


# --- replicas -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ds_config", ["zero1", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_flipped_bit_is_caught_and_its_place_named(tmp_path: Path, ds_config: str):
    parallel = {"ds_config": ds_config, "dtype": "bf16"}
    log = {"check_replicas_every_steps": 2, "tensorboard": False}
    file = run_file(tmp_path, parallel=parallel, log=log)
    done = run_together(
        torchrun(2, "tests.lib.corrupt", str(file), "1", "4", "h.1.attn.c_proj.weight")
    )
    assert "exitcode  : 3" in done.stderr, done.stderr
    assert "after step 4 weights that data-parallel ranks hold in common differ" in done.stderr
    assert "rank 1 differs from rank 0 in h.1.attn.c_proj.weight (of two ranks" in done.stderr
    assert list_checkpoints(tmp_path / "run") == []
    assert len(steps(tmp_path / "run")) == 4


def test_copies_are_compared_before_they_are_saved(tmp_path: Path):
    log = {"check_replicas_every_steps": 0, "tensorboard": False}
    every = {"every_tokens": 256}
    file = run_file(tmp_path, parallel={"ds_config": "zero0"}, log=log, checkpoint=every)
    name = "h.1.attn.c_proj.weight"
    done = run_together(torchrun(2, "tests.lib.corrupt", str(file), "1", "4", name))
    assert "exitcode  : 3" in done.stderr, done.stderr
    assert "after step 4 weights that data-parallel ranks hold in common differ" in done.stderr
    assert f"rank 1 differs from rank 0 in {name}" in done.stderr
    # The copy was right at the three saves before.
    assert list_checkpoints(tmp_path / "run")[-1].name == record.name_of(3)
    done = launch(file, 2)
    assert done.returncode == 0 and "resuming at step 3" in done.stderr, done.stderr


# --- spikes -------------------------------------------------------------------------------------

OFTEN = {"every_tokens": 1024, "keep_last": 99}


def test_a_rollback_skips_bad_samples_and_can_be_replayed(tmp_path: Path):
    sections = {"optimizer": SPIKES, "schedule": FAST, "checkpoint": OFTEN}
    file = with_noise(run_file(tmp_path, **sections, model={"dropout": 0.1}))
    run = tmp_path / "run"
    done = launch(file, 1, launcher="python")
    assert done.returncode == 0, done.stderr
    entries = journal(run)
    assert entries
    for entry in entries:
        assert entry["step"] < entry["spiked_step"] and entry["skipped_samples"] > 0
    records = steps(run)
    last = record.read_record(list_checkpoints(run)[-1])
    assert last.samples == last.tokens // 32 + entries[-1]["skipped_samples"]
    told = [r for r in read_metrics(run) if r.get("event") == "rollback"]
    assert [r["spiked_step"] for r in told] == [e["spiked_step"] for e in entries]

    # The documents behind a step are those that it was trained on.
    assert main(["data", "batch", str(run), "--step", str(entries[0]["step"] + 1)]) == 0

    # Anew beside the same journal, and stopped on the way: the same run, and no new rollback.
    again = tmp_path / "again"
    again.mkdir()
    (again / "journal.jsonl").write_bytes((run / "journal.jsonl").read_bytes())
    stop = f"checkpoint.stop_after_steps={entries[0]['step'] + 1}"
    assert launch(file, 1, f"output={again}", stop, launcher="python").returncode == 75
    done = launch(file, 1, f"output={again}", launcher="python")
    assert done.returncode == 0, done.stderr
    assert journal(again) == entries
    assert exact(steps(again)) == exact(records)
    assert digest_of_weights(again) == digest_of_weights(run)


def test_a_rollback_is_a_resume_to_all_ranks(tmp_path: Path):
    sections = {"optimizer": SPIKES, "schedule": FAST, "checkpoint": OFTEN}
    file = with_noise(run_file(tmp_path, **sections, log={"tensorboard": False}))
    done = launch(file, 2)
    assert done.returncode == 0, done.stderr
    entries = journal(tmp_path / "run")
    assert entries and len(steps(tmp_path / "run")) > entries[-1]["spiked_step"]
    # Killed behind the last rollback, before any newer checkpoint: the journal knows.
    run, killed = tmp_path / "run", tmp_path / "killed"
    (killed / "checkpoints").mkdir(parents=True)
    for folder in list_checkpoints(run):
        if record.read_record(folder).step <= entries[-1]["step"]:
            shutil.copytree(folder, killed / "checkpoints" / folder.name)
    shutil.copy(run / "journal.jsonl", killed)
    done = launch(file, 2, f"output={killed}")
    assert done.returncode == 0, done.stderr
    assert digest_of_weights(killed) == digest_of_weights(run)
    assert journal(killed) == entries


def test_rollbacks_that_do_not_help_end(tmp_path: Path):
    # A learning rate at which the loss jumps from 3 to 8 at step 12, whatever the samples.
    schedule = {"peak_lr": 0.3, "total_tokens": 20_000}
    file = run_file(tmp_path, optimizer=SPIKES, schedule=schedule, checkpoint=OFTEN)
    done = launch(file, 1, launcher="python")
    assert done.returncode == 1
    assert "the loss or gradient spikes again after 3 rollbacks to step 8; lower" in done.stderr
    assert [e["skipped_samples"] for e in journal(tmp_path / "run")] == [40, 80, 120]


def test_a_skipped_step_leaves_the_weights_and_can_be_replayed(tmp_path: Path):
    schedule = FAST | {"total_tokens": 12_288}
    saved = {"every_tokens": 256, "keep_last": 99}
    file = with_noise(run_file(tmp_path, optimizer=SKIPS, schedule=schedule, checkpoint=saved))
    run = tmp_path / "run"
    done = launch(file, 1, launcher="python")
    assert done.returncode == 0, done.stderr
    entries, records = journal(run), steps(run)
    left_out = [e["step"] for e in entries]
    assert left_out and all(e["update"] == "left out" and e["reason"] for e in entries)
    told = [r for r in read_metrics(run) if r.get("event") == "spike"]
    assert [(r["step"], r["update"]) for r in told] == [(step, "left out") for step in left_out]
    assert records[-1]["skipped_steps"] == len(left_out)
    for step in left_out:
        before, without, after = (
            run / "checkpoints" / record.name_of(n) for n in (step - 1, step, step + 1)
        )
        # Nothing is saved of a step that changed nothing; the save comes with the next update.
        assert not without.exists()
        states = [record.read_record(folder) for folder in (before, after)]
        assert states[1].updates == states[0].updates + 1

    # Stopped before the first of them and gone on: judged again, the same bits.
    again = tmp_path / "again"
    stop = f"checkpoint.stop_after_steps={left_out[0] - 1}"
    assert launch(file, 1, f"output={again}", stop, launcher="python").returncode == 75
    # And behind a journal whose checkpoints are gone: its steps are left out unjudged.
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "journal.jsonl", other)
    for output, more in ((again, ()), (other, ("optimizer.spike_threshold=1e9",))):
        done = launch(file, 1, f"output={output}", *more, launcher="python")
        assert done.returncode == 0, done.stderr
        assert journal(output) == entries
        assert exact(steps(output)) == exact(records)
        assert digest_of_weights(output) == digest_of_weights(run)


# --- verify-resume ------------------------------------------------------------------------------


def test_verify_resume_finds_the_same_bits(tmp_path: Path, capsys):
    file = run_file(tmp_path, model={"dropout": 0.1}, parallel={"dtype": "bf16"})
    assert main(["verify-resume", str(file), "--steps", "3", "--ranks", "2"]) == 0
    out, told = capsys.readouterr()
    assert [line[10:] for line in told.splitlines()] == [
        "1 of 3: 7 steps without a break on 2 rank(s)",
        "2 of 3: 3 steps, then stopped",
        "3 of 3: 4 steps from the checkpoint on",
        "comparing",
    ]
    assert out.count("the same, bit for bit") == 11 and "zero1, bf16, 2 rank(s)" in out


def test_verify_resume_tells_what_differs():
    keys = ("tokens", "samples", "batch_tokens", "loss", "grad_norm", "lr", "digest")
    records = [{"step": step} | dict.fromkeys(keys, step / 7) for step in range(1, 7)]
    records[2]["grad_norm"] = math.nan
    other = [dict(r) for r in records]
    other[4]["loss"] += 1e-15
    names = ("rank_00000.safetensors", "rank_00001.safetensors", "config.toml")
    facts = {"step": 6, "tokens": 6, "samples": 6, "seed": 1, "skipped_steps": 0, "updates": 6}
    files = tuple(FileRecord(name, 1, "a") for name in names)
    empty = {"loss_scale": {}, "layout": {}, "data": {}, "versions": {}, "milestone": False}
    state = record.CheckpointRecord(**facts, **empty, files=files)
    # The configuration says how far to go, and so differs.
    files = (files[0], FileRecord(names[1], 1, "b"), FileRecord(names[2], 1, "b"))
    rows = compare((records, state), (other, dataclasses.replace(state, files=files, updates=5)))
    assert rows["loss"].startswith("DIFFERS from step 5 on: ")
    assert rows["weights and moments"] == "DIFFER: rank_00001.safetensors"
    assert rows["updates"] == "DIFFERS: 6 -> 5"
    assert not any(rows[key] for key in ("step", "tokens", "digest", "lr", "grad_norm"))
    assert compare((records, state), (records[:-1], state))["lr"] == "6 steps -> 5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: must be 1 or more"),
        (["--ranks", "5"], "--ranks 5: schedule.batch_tokens"),
    ],
)
def test_verify_resume_refuses(tmp_path: Path, words: list[str], message: str, capsys):
    assert main(["verify-resume", str(run_file(tmp_path)), *words]) == 2
    assert message in capsys.readouterr().err


def test_verify_resume_has_help():
    done = subprocess.run(
        [sys.executable, "-m", "megagpt", "verify-resume", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bit for bit" in done.stdout

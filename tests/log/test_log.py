"""The record of a run, read back from files, through kills and restarts."""

import json
import math
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import DamageError, UsageError
from megagpt.log import read_metrics
from megagpt.log.boards import event_files
from megagpt.log.environment import environment
from megagpt.log.metrics import cut, decode, encode, spans
from megagpt.report.series import read_run
from megagpt.report.table import facts, restart_rows
from tests.lib.recorded import BATCH, curve, open_log, record, run_until_killed, steps


def test_a_step_is_in_metrics_and_in_tensorboard(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.step(record(step) | {"mfu": 0.4, "sources": {"web": {"tokens": 10, "epochs": 0.1}}})
    log.evaluation({"step": 5, "tokens": 5000, "validation_loss": 2.0})
    log.close()
    lines = steps(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[2]["loss"] == 5.0 / 3  # bit for bit
    for tag, name in (("train/loss", "loss"), ("w_update/lr", "lr"), ("x_speed/mfu", "mfu")):
        read = curve(tmp_path, tag)
        assert [step for step, _ in read] == [line["tokens"] for line in lines]
        assert [value for _, value in read] == pytest.approx([line[name] for line in lines])
    assert curve(tmp_path, "x_sources/web/epochs")[0] == (1000, pytest.approx(0.1))
    assert curve(tmp_path, "validation/validation_loss") == [(5000, 2.0)]
    assert curve(tmp_path, "validation/validation_perplexity")[0][1] == pytest.approx(math.e**2)


def test_without_writer_nothing_is_written(tmp_path):
    log = open_log(tmp_path / "run", writer=False)
    log.step(record(1))
    log.evaluation({"step": 1, "tokens": 1000, "validation_loss": 2.0})
    log.event("checkpoint")
    log.text("a", "b", 1)
    log.samples(["a"])
    log.profile("table")
    assert log.records("loss") == []
    log.close()
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_finds_its_own_records(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 5):
        log.step(record(step) | ({"noise_trace": 2.0 * step} if step % 2 else {}))
    log.event("spike", reason='"noise_trace":')
    log.close()
    log = open_log(tmp_path, 2)
    assert [line["noise_trace"] for line in log.records("noise_trace")] == [2.0]
    log.close()


def test_tensorboard_can_be_switched_off(tmp_path):
    log = open_log(tmp_path, tensorboard=False)
    log.step(record(1))
    log.close()
    log.close()
    assert len(steps(tmp_path)) == 1
    assert not (tmp_path / "tensorboard").exists()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back_bit_for_bit(value):
    assert decode(encode({"loss": value}))["loss"] == value


def test_metrics_lines_are_strict_json():
    line = encode({"loss": math.nan, "grad_norm": math.inf, "parts": {"a": -math.inf}})
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    read = decode(line)
    assert math.isnan(read["loss"]) and read["grad_norm"] == math.inf
    assert read["parts"]["a"] == -math.inf


def test_scalars_of_torch_and_numpy_are_numbers(tmp_path):
    import numpy as np
    import torch

    log = open_log(tmp_path)
    log.step(record(1) | {"loss": torch.tensor(2.5), "grad_norm": np.float32(0.25)})
    log.close()
    assert steps(tmp_path)[0]["loss"] == 2.5
    assert steps(tmp_path)[0]["grad_norm"] == 0.25
    assert curve(tmp_path, "train/loss") == [(1000, 2.5)]


def test_one_clean_curve_after_kills(tmp_path):
    run_until_killed(tmp_path, 0, 30)
    run_until_killed(tmp_path, 20, 25)  # before the first kill's last step
    run_until_killed(tmp_path, 20, 45)  # the same place again
    last = event_files(tmp_path / "tensorboard")[-1]
    os.truncate(last, last.stat().st_size - 7)  # a record that the kill left half-written
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4')
    log = open_log(tmp_path, 40)
    for step in range(41, 61):
        log.step(record(step))
    log.close()

    lines = steps(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert curve(tmp_path, "train/loss") == [
        (line["tokens"], pytest.approx(line["loss"])) for line in lines
    ]
    evaluations = [line["tokens"] for line in read_metrics(tmp_path) if "validation_loss" in line]
    assert evaluations == list(range(4000, 40_001, 4000))
    assert [step for step, _ in curve(tmp_path, "validation/validation_loss")] == evaluations
    events = [line for line in read_metrics(tmp_path) if "event" in line]
    assert [event["event"] for event in events] == ["start", "resume", "resume", "resume"]
    assert events[1]["lost_steps"] >= 10 and events[1]["lost_tokens"] >= 10 * BATCH
    assert events[1]["lost_s"] == pytest.approx(events[1]["lost_steps"] * 0.5)
    assert 0 <= events[1]["down_s"] < 60


def test_what_lies_between_a_complete_run_and_its_extension_is_no_loss(tmp_path):
    log = open_log(tmp_path)
    log.step(record(1))
    log.complete()
    log.close()
    time.sleep(0.05)
    log = open_log(tmp_path, 1)
    log.step(record(2))
    log.close()
    # Killed behind the extension's first step: that is a restart, whatever was complete before.
    log = open_log(tmp_path, 2)
    log.step(record(3))
    log.close()
    extension, restart = (line for line in read_metrics(tmp_path) if line.get("event") == "resume")
    assert extension["down_s"] == 0.0 and extension["paused_s"] >= 0.05
    assert restart["down_s"] >= 0.0 and "paused_s" not in restart
    run = read_run(tmp_path)
    assert [event["cause"] for event in run.restarts] == ["extension", "restart"]
    assert run.times is not None
    assert run.wall_s == pytest.approx(run.times[1] - run.times[0] - extension["paused_s"])
    assert len(restart_rows(run)) == 1 and dict(facts(run))["extensions"] == "1"


def test_a_crash_before_the_first_checkpoint_starts_over(tmp_path):
    first = {"step": 0, "tokens": 0, "validation_loss": 9.0}
    log = open_log(tmp_path, 0)
    log.evaluation(first)
    log.step(record(1))
    log = open_log(tmp_path, 0)
    log.evaluation(first)
    log.step(record(1))
    log.close()
    assert [line["step"] for line in steps(tmp_path)] == [1]
    assert len([line for line in read_metrics(tmp_path) if "validation_loss" in line]) == 1
    assert curve(tmp_path, "validation/validation_loss") == [(0, 9.0)]
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1000]


def test_a_clean_stop_loses_nothing(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 4):
        log.step(record(step))
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    log = open_log(tmp_path, 3)
    log.step(record(4))
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1000, 2000, 3000, 4000]


def test_read_metrics_names_what_is_wrong(tmp_path):
    with pytest.raises(UsageError, match=r"metrics\.jsonl: not found"):
        read_metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\n[3]\n{"step": 2}\n')
    with pytest.raises(DamageError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        read_metrics(tmp_path)


def test_decode_refuses_what_is_not_an_object():
    with pytest.raises(ValueError, match="expected an object, found list"):
        decode(b"[1]\n")


def test_cutting_goes_on_past_damage(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 1}\n\0\0\n{"step": 2}\n{"event": "x", "step": 9}\n{"st'
    path.write_bytes(damaged)
    found = cut(path, 1)
    assert (found.dropped, found.last_time, found.missing) == ([{"step": 2}], None, "1")
    assert path.read_bytes() == b'{"step": 1}\n{"event": "x", "step": 9}\n'
    assert f"{path}: lines 2, 5 are broken; the file as it was is {found.aside}" in caplog.text
    assert (found.restored, found.aside) == ("", f"{path}.broken-1")
    assert (tmp_path / "metrics.jsonl.broken-1").read_bytes() == damaged
    # What a kill leaves is no damage that anybody would want back.
    path.write_bytes(b'{"step": 1, "loss": 1}\n{"st')
    assert cut(path, 1)[2:] == ("", "", "")
    path.write_bytes(damaged)
    assert cut(path, 1).aside == f"{path}.broken-2"


def test_what_the_record_has_lost_is_said(tmp_path, caplog):
    log = open_log(tmp_path, tensorboard=False)
    for step in range(1, 11):
        log.step(record(step))
    log.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[6:7] + [b"{#}\n"] + lines[8:]))
    open_log(tmp_path, 8, tensorboard=False).close()
    (event,) = [line for line in read_metrics(tmp_path) if line.get("event") == "resume"]
    assert event["missing_steps"] == "3-5, 7" and event["broken_file"] == f"{path}.broken-1"
    assert "steps 3-5, 7 have no line and will be missing" in caplog.text
    # An empty file, as a power cut left it, and none at all.
    for number in range(2):
        path.write_bytes(b"") if number else path.unlink()
        open_log(tmp_path, 8, tensorboard=False).close()
        (event,) = read_metrics(tmp_path)
        assert (event["event"], event["missing_steps"]) == ("resume", "1-8")


def test_a_folder_that_was_moved_or_removed_is_noticed(tmp_path):
    run = tmp_path / "run"
    log = open_log(run)
    log.step(record(1))
    assert not log.displaced()
    run.rename(tmp_path / "elsewhere")
    assert log.displaced()
    log.step(record(2))
    log.close()
    assert not log.displaced() and len(steps(tmp_path / "elsewhere")) == 2
    log = open_log(run, 2)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").write_bytes(b"")
    assert log.displaced()
    log.close()
    log = open_log(run, 2)
    event_files(run / "tensorboard")[-1].unlink()
    assert log.displaced()
    log.close()


def test_what_is_synced_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda at: (synced.append(os.readlink(f"/proc/self/fd/{at}")), fsync(at))
    )
    log = open_log(tmp_path)
    assert str(tmp_path) in synced  # the file's name
    synced.clear()
    log.step(record(1))
    log.sync()
    (events,) = event_files(tmp_path / "tensorboard")
    assert synced == [str(tmp_path / "metrics.jsonl"), str(events)]
    log.close()
    log.sync()


def test_the_environment_names_versions():
    facts = environment()
    assert facts["python"].startswith("3.") and facts["torch"] and facts["host"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([1, 2], "1-2"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")],
)
def test_spans(numbers, text):
    assert spans(numbers) == text

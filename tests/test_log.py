"""The record of a run, read back from files, through kills and restarts."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt.errors import DamageError, UsageError
from megagpt.log import RunLog, read_metrics
from megagpt.log.board import Board, event_files
from megagpt.log.console import figures, fitting
from megagpt.log.environment import environment
from megagpt.log.eta import Eta
from megagpt.log.layout import derived, tags
from megagpt.log.metrics import cut, decode, encode
from megagpt.log.text import amount, duration

BATCH = 1000
ROOT = Path(__file__).parent.parent


def record(step: int, loss: float | None = None) -> dict:
    return {
        "step": step,
        "tokens": step * BATCH,
        "samples": step * 10,
        "loss": 5.0 / step if loss is None else loss,
        "lr": 1e-3,
        "batch_tokens": BATCH,
        "grad_norm": 0.5,
        "tokens_per_s": 2000.0,
    }


def open_log(folder: Path, resume_step: int = 0, **options) -> RunLog:
    options.setdefault("console", "off")
    return RunLog(
        folder,
        total_tokens=100 * BATCH,
        resume_tokens=resume_step * BATCH,
        resume_step=resume_step,
        **options,
    )


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def steps(folder: Path) -> list[dict]:
    return [line for line in read_metrics(folder) if "loss" in line]


def test_a_step_is_in_metrics_and_in_tensorboard(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.step(record(step) | {"mfu": 0.4, "sources": {"web": {"tokens": 10, "epochs": 0.1}}})
    log.evaluation({"step": 5, "tokens": 5000, "validation_loss": 2.0})
    log.close()
    lines = steps(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[2]["loss"] == 5.0 / 3  # bit for bit
    for tag, name in (("train/loss", "loss"), ("train/lr", "lr"), ("speed/mfu", "mfu")):
        read = curve(tmp_path, tag)
        assert [step for step, _ in read] == [line["tokens"] for line in lines]
        assert [value for _, value in read] == pytest.approx([line[name] for line in lines])
    assert curve(tmp_path, "sources/web/epochs")[0] == (1000, pytest.approx(0.1))
    assert curve(tmp_path, "validation/validation_loss") == [(5000, 2.0)]
    assert curve(tmp_path, "validation/validation_perplexity")[0][1] == pytest.approx(math.e**2)


def test_without_writer_nothing_is_written(tmp_path):
    log = open_log(tmp_path / "run", writer=False)
    log.step(record(1))
    log.evaluation({"step": 1, "tokens": 1000, "validation_loss": 2.0})
    log.event("checkpoint")
    log.text("a", "b", 1)
    log.close()
    assert not (tmp_path / "run").exists()


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


KILLED = """
import sys, time
from tests.test_log import open_log, record
log = open_log(__import__("pathlib").Path(sys.argv[1]), int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 1, 10_000):
    log.step(record(step))
    if step % 4 == 0:
        log.evaluation({"step": step, "tokens": step * 1000, "validation_loss": 7.0 / step})
    print(step, flush=True)
"""


def run_until_killed(folder: Path, resume_step: int, kill_after: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(resume_step)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= kill_after:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()


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


def test_a_tensorboard_open_since_before_the_kill_sees_one_curve(tmp_path):
    run_until_killed(tmp_path, 0, 12)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert events.Scalars("train/loss")[-1].step >= 12_000
    log = open_log(tmp_path, 6)
    log.step(record(7))
    log.close()
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1000, 7001, 1000))


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


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_tensorboard_resumes_from_a_file_cut_anywhere(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    board = Board(folder / "tensorboard")
    for step in range(1, 5):
        board.scalars({"train/loss": float(step)}, step)
    board.close()
    size = board.path.stat().st_size
    os.truncate(board.path, data.draw(st.integers(0, size)))
    left = curve_or_nothing(folder)
    board = Board(folder / "tensorboard", resume_tokens=2)
    board.scalars({"train/loss": 3.0}, 3)
    board.close()
    assert [step for step, _ in curve(folder, "train/loss")] == [*(s for s in left if s <= 2), 3]


def curve_or_nothing(folder: Path) -> list[int]:
    try:
        return [step for step, _ in curve(folder, "train/loss")]
    except KeyError:
        return []


def test_the_new_event_file_sorts_last_even_when_the_clock_is_behind(tmp_path):
    ahead = int(time.time()) + 5000
    (tmp_path / f"events.out.tfevents.{ahead}.host.1.0").touch()
    first = Board(tmp_path)
    first.scalars({"a": 1.0}, 1)
    second = Board(tmp_path, resume_tokens=1)
    assert event_files(tmp_path)[-2:] == [first.path, second.path]
    first.close()
    second.close()


def test_texts_and_the_first_screen_are_in_tensorboard(tmp_path):
    from tensorboard.plugins.custom_scalar import layout_pb2

    (tmp_path / "config.toml").write_text("seed = 1\n")
    log = open_log(tmp_path)
    log.text("samples/greedy", "def f():", 0)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    text = events.Tensors("run/config.toml")
    assert text[0].tensor_proto.string_val[0] == b"    seed = 1\n"
    assert events.Tensors("samples/greedy")[0].tensor_proto.string_val[0] == b"def f():"
    assert b"| torch |" in events.Tensors("run/environment")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    assert layout.category[0].chart[0].title == "loss, training and validation"


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
    path.write_bytes(b'{"step": 1}\n\0\0\n{"step": 2}\n{"event": "x", "step": 9}\n{"st')
    assert cut(path, 1) == [{"step": 2}]
    assert path.read_bytes() == b'{"step": 1}\n{"event": "x", "step": 9}\n'
    assert "dropped 2 broken lines" in caplog.text


def test_groups_of_tags():
    values = tags({"step": 3, "tokens": 7, "time": 1.0, "loss": 2.0, "new": 1, "name": "x"})
    assert values == {"progress/step": 3.0, "train/loss": 2.0, "more/new": 1.0}
    assert tags({"validation_losses": {"web": 2.0}}) == {"validation/web": 2.0}
    assert tags({"layers": {"h.0": {"grad_norm": 2.0}}}) == {"layers/h.0/grad_norm": 2.0}


def test_bits_per_byte_and_perplexity_by_hand():
    # A loss of ln 2 nats is one bit a token, and 4 bytes a token make it a quarter bit a byte.
    values = derived({"validation_loss": math.log(2)}, bytes_per_token=4.0)
    assert values["validation/validation_bits_per_byte"] == pytest.approx(0.25)
    assert values["validation/validation_perplexity"] == pytest.approx(2.0)
    assert math.isnan(derived({"loss": math.nan})["train/perplexity"])
    assert math.isfinite(derived({"loss": 1e9})["train/perplexity"])


def test_plain_lines(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, console="plain", every_steps=5)
    for step in range(1, 101):
        log.step(record(step) | {"mfu": 0.412, "step_s": 0.5})
    log.evaluation(
        {"step": 100, "tokens": 100_000, "validation_loss": 2.0}
        | {"validation_losses": {"web": 1.5, "books": 2.5}}
    )
    log.event("checkpoint", name="step-100")
    log.close()
    lines = [entry.getMessage() for entry in caplog.records]
    assert len([line for line in lines if "tok/s" in line]) == 21  # 1, 5, 10 ... 100
    assert lines[0].endswith("start")
    assert lines[1] == (
        "step 1  tokens 1k/100k (1.0%)  loss 5.0000  lr 1.00e-03  batch 1k  grad 0.5  2k tok/s"
        "  mfu 41.2%  eta 50 s"
    )
    assert "validation loss 2.0000  (web 1.5000  books 2.5000)" in lines[-2]
    assert lines[-1] == "step 100  checkpoint  name step-100"


def test_console_must_be_known(tmp_path):
    with pytest.raises(ValueError, match="console = 'loud': must be one of auto, bar, plain, off"):
        open_log(tmp_path, console="loud")


BAR = """
import logging, sys, time
from pathlib import Path
from tests.test_log import open_log, record
logging.basicConfig(level=logging.INFO, format="%(message)s")
log = open_log(Path(sys.argv[1]), console="auto")
for step in range(1, 101):
    log.step(record(step))
    if step == 49:
        time.sleep(0.5)
    if step == 50:
        logging.info("a message in between")
        time.sleep(0.5)
log.close()
logging.info("after the bar")
"""


def test_a_bar_on_a_terminal(tmp_path):
    import pty

    main, side = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", BAR, str(tmp_path)],
        stderr=side,
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "140"},
    ) as process:
        os.close(side)
        shown = b""
        while True:
            try:
                shown += os.read(main, 65_536)
            except OSError:  # the other side has ended
                break
    assert process.returncode == 0
    text = shown.decode()
    assert "50k/100k tokens" in text and "100k/100k tokens" in text
    assert "loss 0.0500" in text and "eta 0 s" in text
    assert "a message in between" in text and "after the bar" in text


def test_the_figures_that_tell_most_fit_first():
    texts = figures(record(2) | {"mfu": 0.4, "skipped_steps": 1})
    assert fitting(texts, 200) == (
        "loss 2.5000  lr 1.00e-03  batch 1k  grad 0.5  2k tok/s  mfu 40.0%  skipped 1"
    )
    assert fitting(texts, 36) == "loss 2.5000  2k tok/s  skipped 1"
    assert fitting(texts, 5) == ""


def test_eta_counts_the_ramp():
    # step time = 1 s + 1 ms a token; batches of 1000 below 50k tokens, of 4000 after.
    eta = Eta(100_000, lambda tokens: 1000 if tokens < 50_000 else 4000)
    for size in (1000, 1000, 2000, 2000):
        eta.observe(size, 1.0 + size / 1000)
    # 30 steps of 1000 and 12.5 of 4000 are left, and 80k tokens.
    assert eta.seconds(20_000) == pytest.approx(30 + 12.5 + 80, rel=0.01)
    assert eta.seconds(100_000) == 0.0


def test_eta_before_the_first_step_and_at_one_size():
    eta = Eta(1000)
    assert eta.seconds(0) is None
    eta.observe(100, 2.0)
    assert eta.seconds(500) == pytest.approx(10.0)
    # Larger batches were no slower: all of the step is a fixed time.
    eta.observe(200, 2.0)
    assert eta.seconds(500) == pytest.approx(5.0)


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-3, 1e3)), min_size=1, max_size=30),
    st.integers(0, 10**9),
)
def test_eta_is_never_negative(observed, tokens):
    eta = Eta(10**9, lambda done: 1000 + done // 1000)
    for size, step_s in observed:
        eta.observe(size, step_s)
    left = eta.seconds(tokens)
    assert left is not None and left >= 0 and math.isfinite(left)


def test_amounts_and_durations():
    assert [amount(n) for n in (0, 512, 999.7, 1000, 32_768, 1_250_000, 3e11, 999_990)] == [
        "0", "512", "1k", "1k", "32.8k", "1.25M", "300B", "1M",
    ]  # fmt: skip
    assert [duration(s) for s in (0.2, 59.6, 125, 3600, 90_000, None)] == [
        "0 s", "1 min", "2 min 5 s", "1 h", "1 d 1 h", "?",
    ]  # fmt: skip


def test_the_environment_names_versions():
    facts = environment()
    assert facts["python"].startswith("3.") and facts["torch"] and facts["host"]

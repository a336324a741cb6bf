"""TensorBoard's event files: cut, resumed, and what stands in them."""

import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt.log.boards import TensorBoard, event_files
from megagpt.log.repair import repair_events
from megagpt.log.tags import derived, record_of, tags
from megagpt.use.pictures import png
from tests.lib.recorded import curve, open_log, record, run_until_killed


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


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_tensorboard_resumes_from_a_file_cut_anywhere(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    board = TensorBoard(folder / "tensorboard")
    for step in range(1, 5):
        board.scalars({"train/loss": float(step)}, step)
    board.close()
    size = board.path.stat().st_size
    os.truncate(board.path, data.draw(st.integers(0, size)))
    left = curve_or_nothing(folder)
    board = TensorBoard(folder / "tensorboard", resume_tokens=2)
    board.scalars({"train/loss": 3.0}, 3)
    board.close()
    assert [step for step, _ in curve(folder, "train/loss")] == [*(s for s in left if s <= 2), 3]


DAMAGE = {
    "a bit of a value": lambda data, at: (
        data[: at + 20] + bytes([data[at + 20] ^ 4]) + data[at + 21 :]
    ),
    "a length": lambda data, at: data[:at] + b"\xff\xff" + data[at + 2 :],
    "zeros over records": lambda data, at: data[: at + 5] + bytes(300) + data[at + 305 :],
    "a hole": lambda data, at: data[: at + 7] + data[at + 333 :],
    "foreign bytes between": lambda data, at: data[:at] + b"<html>" + data[at:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_sound_events_behind_a_damaged_one_are_read_again(tmp_path, caplog, damage):
    board = TensorBoard(tmp_path / "tensorboard")
    before = board.path.stat().st_size
    for step in range(1, 201):
        board.scalars({"train/loss": float(step), "w_update/lr": 0.5}, step)
    board.close()
    whole = board.path.read_bytes()
    # In the middle of the scalars, at the beginning of a record.
    at = before + (len(whole) - before) // 200 * 20
    damaged = DAMAGE[damage](whole, at)
    board.path.write_bytes(damaged)
    assert len(curve_or_nothing(tmp_path)) < 25
    TensorBoard(tmp_path / "tensorboard", resume_tokens=200).close()
    left = curve_or_nothing(tmp_path)
    assert len(left) >= 190 and left == sorted(left) and left[-1] == 200
    assert "damaged in 1 place(s), where TensorBoard stops" in caplog.text
    (aside,) = (tmp_path / "tensorboard").glob("*.broken-1")
    assert aside.read_bytes() == damaged and "tfevents" not in aside.name
    # Once repaired it stays as it is.
    assert repair_events(board.path) == ""


def curve_or_nothing(folder: Path) -> list[int]:
    try:
        return [step for step, _ in curve(folder, "train/loss")]
    except KeyError:
        return []


def test_the_new_event_file_sorts_last_even_when_the_clock_is_behind(tmp_path):
    ahead = int(time.time()) + 5000
    (tmp_path / f"events.out.tfevents.{ahead}.host.1.0").touch()
    first = TensorBoard(tmp_path)
    first.scalars({"a": 1.0}, 1)
    second = TensorBoard(tmp_path, resume_tokens=1)
    assert event_files(tmp_path)[-2:] == [first.path, second.path]
    first.close()
    second.close()


def test_a_picture_is_a_file_and_in_tensorboard(tmp_path):
    content = png(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    log = open_log(tmp_path)
    log.samples(content)
    log.close()
    assert (tmp_path / "samples/step_00000000.png").read_bytes() == content
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    [found] = events.Images("samples")
    assert (found.encoded_image_string, found.width, found.height) == (content, 6, 4)


def test_texts_and_the_first_screen_are_in_tensorboard(tmp_path):
    from tensorboard.plugins.custom_scalar import layout_pb2

    (tmp_path / "config.toml").write_text("seed = 1\n")
    log = open_log(tmp_path)
    log.samples(["def f():", "x"])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    text = events.Tensors("run/config.toml")
    assert text[0].tensor_proto.string_val[0] == b"    seed = 1\n"
    assert events.Tensors("samples/1")[0].tensor_proto.string_val[0] == b"    def f():\n"
    told = (tmp_path / "samples" / "step_00000000.txt").read_text()
    assert told == "--- 1 of 2 ---\ndef f():\n--- 2 of 2 ---\nx\n"
    assert b"| torch |" in events.Tensors("run/environment")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    assert layout.category[0].chart[0].title == "loss, training and validation"


def test_groups_of_tags():
    values = tags({"step": 3, "tokens": 7, "time": 1.0, "loss": 2.0, "new": 1, "name": "x"})
    assert values == {"x_progress/step": 3.0, "train/loss": 2.0, "x_more/new": 1.0}
    assert tags({"validation_losses": {"web": 2.0}}) == {"validation/web": 2.0}
    assert tags({"norms": {"update": {"h.0": 2.0}}}) == {"y_norms/update/h.0": 2.0}
    assert tags({"layers": {"h.0": {"grad_norm": 2.0}}}) == {"x_layers/h.0/grad_norm": 2.0}


def test_losses_sort_before_all_other_figures_and_layers_after_them():
    """TensorBoard sorts what it shows by name."""
    step = {"loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "batch_tokens": 8, "mfu": 0.4, "new": 1.0}
    layers = {"norms": {"gradient": {"h.0": 1.0}}, "activations": {"largest": {"h.0": 1.0}}}
    record = step | layers | {"validation_loss": 2.0, "sources": {"web": {"epochs": 0.1}}}
    found = sorted(tags(record) | derived(record))
    assert found[:4] == [
        "train/loss",
        "train/perplexity",
        "validation/validation_loss",
        "validation/validation_perplexity",
    ]
    assert found[-2:] == ["y_activations/largest/h.0", "y_norms/gradient/h.0"]


def test_figures_of_older_events_are_read():
    old = {"train/loss": 2.0, "train/lr": 0.5, "speed/mfu": 0.4, "x_more/new": 1.0}
    assert record_of(old) == {"loss": 2.0, "lr": 0.5, "mfu": 0.4, "new": 1.0}


def test_perplexity_by_hand():
    found = derived({"validation_loss": math.log(2)})
    assert found == {"validation/validation_perplexity": pytest.approx(2.0)}
    assert math.isnan(derived({"loss": math.nan})["train/perplexity"])
    assert math.isfinite(derived({"loss": 1e9})["train/perplexity"])

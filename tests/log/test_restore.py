"""Lines that metrics.jsonl has lost come back from TensorBoard's events."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.log import read_metrics
from megagpt.log.boards import event_files
from megagpt.log.tags import derived, record_of, tags
from tests.lib.recorded import curve, open_log, record, steps

NAMES = st.text("abc./_0", min_size=1).map(lambda name: f"n{name}")
FIGURES = st.floats(width=32, allow_nan=False)


def full(step: int) -> dict:
    """A record of a step with figures in figures, and a text."""
    sources = {"data/web": {"tokens": 3 * step, "epochs": step / 7}}
    norms = {"gradient": {"h.0": 0.1 * step, "ln_f": 2.0}}
    return record(step) | {"digest": f"{step:016x}", "sources": sources, "norms": norms}


def written(folder, first: int = 0, last: int = 10) -> bytes:
    """Steps and evaluations of one session; the file."""
    log = open_log(folder, first)
    if not first:
        log.evaluation({"step": 0, "tokens": 0, "validation_loss": 9.0})
    for step in range(first + 1, last + 1):
        log.step(full(step))
        if step % 4 == 0:
            losses = {"data/a": 7.0 / step, "b": 6.5}
            facts = {"step": step, "tokens": step * 1000, "validation_loss": 7.0 / step}
            log.evaluation(facts | {"validation_losses": losses})
    log.close()
    return (folder / "metrics.jsonl").read_bytes()


def near(found, expected) -> bool:
    """Whether two records are the same to a float32's precision."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(near(found[k], expected[k]) for k in found)
    if not isinstance(expected, float):
        return bool(found == expected)
    return bool(found == pytest.approx(expected, rel=1e-6))


def without(line: dict, *keys: str) -> dict:
    return {key: value for key, value in line.items() if key not in keys}


@pytest.mark.parametrize("left", ["nothing", "a part", "no file"])
def test_lost_lines_come_back_in_their_places(tmp_path, left, caplog):
    whole = written(tmp_path)
    path = tmp_path / "metrics.jsonl"
    before = [line for line in read_metrics(tmp_path) if "event" not in line]
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4] + [b'{"st\n'] + lines[9:]) if left == "a part" else b"")
    if left == "no file":
        path.unlink()
    open_log(tmp_path, 8).close()
    after = [line for line in read_metrics(tmp_path) if "event" not in line]
    expected = [line for line in before if line["step"] <= 8]
    assert [(r["step"], "loss" in r) for r in after] == [(r["step"], "loss" in r) for r in expected]
    back = [line for line in after if "restored_from" in line]
    assert len(back) == (5 if left == "a part" else 11)
    for found, wanted in zip(after, expected, strict=True):
        if "restored_from" in found:
            found, wanted = without(found, "restored_from"), without(wanted, "digest")
        assert near(found, wanted), (found, wanted)
    (event,) = [line for line in read_metrics(tmp_path) if line.get("event") == "resume"]
    assert event["restored_steps"] == ("3-6" if left == "a part" else "1-8")
    assert "missing_steps" not in event and "written again, with 7 digits" in caplog.text
    # 0.001 is 0.0010000000474974513 as a float32.
    assert {line["lr"] for line in after if "lr" in line} == {1e-3}


def test_of_steps_that_were_taken_twice_the_later_session_counts(tmp_path):
    written(tmp_path, 0, 8)
    log = open_log(tmp_path, 4)
    for step in (5, 6):
        log.step(full(step) | {"loss": 77.0})
    log.close()
    (tmp_path / "metrics.jsonl").unlink()
    open_log(tmp_path, 8).close()
    assert [line["loss"] for line in steps(tmp_path)][4:] == [77.0, 77.0]
    (event,) = read_metrics(tmp_path)[-1:]
    assert (event["restored_steps"], event["missing_steps"]) == ("1-6", "7-8")
    assert [tokens for tokens, _ in curve(tmp_path, "train/loss")] == list(range(1000, 6001, 1000))


def test_a_damaged_event_file_gives_what_is_sound(tmp_path):
    written(tmp_path)
    (file,) = event_files(tmp_path / "tensorboard")
    data = bytearray(file.read_bytes())
    data[data.index(b"x_sources/data/web/tokens") + 3] ^= 1
    file.write_bytes(data)
    (tmp_path / "metrics.jsonl").unlink()
    open_log(tmp_path, 10).close()
    (event,) = read_metrics(tmp_path)[-1:]
    assert (event["restored_steps"], event["missing_steps"]) == ("2-10", "1")


def test_a_disk_that_fails_meanwhile_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    whole = written(tmp_path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        open_log(tmp_path, 8)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {"loss": FIGURES, "lr": FIGURES, "step": st.integers(1, 2**24 - 1), "new": FIGURES},
        optional={
            "samples": st.integers(0, 2**24 - 1),
            "validation_losses": st.dictionaries(NAMES, FIGURES, min_size=1),
            "sources": st.dictionaries(
                NAMES, st.fixed_dictionaries({"epochs": FIGURES}), min_size=1
            ),
            "norms": st.fixed_dictionaries(
                {"gradient": st.just({"h.0": 1.0}), "ratio": st.just({"ln_f": 2.0})}
            ),
            "noise_scale_tokens": FIGURES,
        },
    )
)
def test_a_record_is_read_back_from_its_tags(made):
    assert record_of(tags(made) | derived(made)) == made


def test_numbers_that_a_float32_rounds_are_no_places():
    assert record_of(tags({"step": 3, "samples": 2**24 + 1, "loss": 2.0})) == {
        "step": 3,
        "loss": 2.0,
    }

"""Schedules: hand numbers at the knees, and conservation of tokens for any ramp."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.presets import PRESETS
from megagpt.config.schedule import Schedule

GPT3 = Schedule(**PRESETS["gpt3-125m"].schedule)


def test_lr_at_the_knees_of_gpt3():
    assert GPT3.lr(0) == 0
    assert GPT3.lr(187_500_000) == pytest.approx(3.0e-4)
    assert GPT3.lr(375_000_000) == pytest.approx(6.0e-4)
    half = (375_000_000 + 260_000_000_000) // 2
    assert GPT3.lr(half) == pytest.approx(0.55 * 6.0e-4)
    assert GPT3.lr(260_000_000_000) == pytest.approx(6.0e-5)
    assert GPT3.lr(299_000_000_000) == pytest.approx(6.0e-5)


def test_batch_of_gpt3_starts_at_32k_and_grows_linearly():
    assert GPT3.batch(0) == 32_768
    assert GPT3.batch(4_000_000_000) == 524_288
    for tokens in range(0, 4_000_000_000, 97_000_001):
        line = 32_768 + (524_288 - 32_768) * tokens / 4e9
        assert line - 32_768 < GPT3.batch(tokens) <= line


def test_total_steps_of_gpt3_125m():
    segments = GPT3.segments
    assert len(segments) == 16
    assert [s.batch_tokens for s in segments] == [32_768 * k for k in range(1, 17)]
    assert 300_000_000_000 <= GPT3.end_tokens < 300_000_000_000 + 524_288
    assert GPT3.n_steps == sum(s.n_steps for s in segments)


small = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(
    increment=small,
    start=small,
    growth=st.integers(0, 12),
    ramp=st.integers(0, 2000),
    total=st.integers(1, 3000),
)
def test_segments_are_the_walk_itself(increment, start, growth, ramp, total):
    schedule = Schedule(
        total_tokens=total,
        peak_lr=1.0,
        batch_tokens=increment * (start + growth),
        ramp_start_tokens=increment * start,
        ramp_tokens=ramp,
        ramp_increment_tokens=increment,
    )
    assert not list(schedule.problems())
    tokens, step, walked = 0, 0, []
    while tokens < total:
        size = schedule.batch(tokens)
        assert schedule.position(step) == (tokens, size)
        walked.append(size)
        tokens, step = tokens + size, step + 1
    assert schedule.n_steps == step
    assert schedule.end_tokens == tokens
    flat = [s.batch_tokens for s in schedule.segments for _ in range(s.n_steps)]
    assert flat == walked == sorted(walked)


def test_position_outside_the_run():
    with pytest.raises(ValueError, match=r"step 10 is outside the run: it has steps 0 to 9"):
        Schedule(total_tokens=100, peak_lr=1.0, batch_tokens=10).position(10)


def test_cosine_is_the_papers():
    schedule = Schedule(total_tokens=1000, warmup_tokens=100, peak_lr=2.0, batch_tokens=10)
    for tokens in range(100, 1000, 50):
        expected = 0.2 + 0.9 * (1 + math.cos(math.pi * (tokens - 100) / 900))
        assert schedule.lr(tokens) == pytest.approx(expected)


def test_a_linear_decay_is_a_line_to_its_floor():
    wanted = {"total_tokens": 1000, "warmup_tokens": 100, "peak_lr": 2.0, "batch_tokens": 10}
    schedule = Schedule(**wanted, decay="linear", min_lr_ratio=0.1)
    for tokens in range(100, 1000, 50):
        assert schedule.lr(tokens) == pytest.approx(2.0 - 1.8 * (tokens - 100) / 900)
    # To 0 it is GPT-1's (1 - t / T from the end of the warm-up on), the last update above 0.
    to_zero = Schedule(**wanted, decay="linear", min_lr_ratio=0.0)
    assert to_zero.lr(50) == 1.0 and to_zero.lr(1000) == pytest.approx(2.0 * 10 / 910)


@pytest.mark.parametrize("preset", ["gpt1", "igpt-s"])
def test_the_last_update_of_a_run_that_anneals_to_0_has_a_rate(preset):
    schedule = Schedule(**PRESETS[preset].schedule)
    last = schedule.lr(schedule.end_tokens)
    # The last of T + 1 points from the end of the warm-up to 0, T the updates after it.
    updates = (schedule.end_tokens - schedule.warmup_tokens) / schedule.batch_tokens
    assert schedule.min_lr_ratio == 0.0
    assert last / schedule.peak_lr == pytest.approx((math.pi / 2 / (updates + 1)) ** 2, rel=0.01)
    # With a floor it is the floor, as ever.
    floored = dataclasses.replace(schedule, min_lr_ratio=0.1)
    assert floored.lr(schedule.end_tokens) == 0.1 * schedule.peak_lr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_tokens": 2000}, "schedule.warmup_tokens = 2000: must be less than decay_tokens"),
        ({"ramp_start_tokens": 64}, "divides batch_tokens (32), because the batch grows in steps"),
        (
            {"ramp_start_tokens": 64, "ramp_increment_tokens": 16},
            "must not be more than batch_tokens (32), the last batch; use 32 or less",
        ),
        ({"ramp_start_tokens": 8, "ramp_increment_tokens": 16}, "multiple of ramp_increment"),
    ],
)
def test_problems_name_key_value_and_rule(change, message):
    sound = {"total_tokens": 1000, "peak_lr": 1.0, "batch_tokens": 32}
    problems = list(Schedule(**{**sound, **change}).problems())
    assert any(message in problem for problem in problems), problems

"""Whether a run goes on as the one that was saved: what differs is told, refused or allowed."""

import dataclasses

import pytest

from megagpt.checkpoint import resume
from megagpt.checkpoint.load import _rates, differences
from megagpt.config import RunConfig
from megagpt.engine import Ranks, build_engine
from megagpt.errors import UsageError
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from tests.lib.checkpoints import fingerprint


def test_what_a_longer_schedule_does_to_the_rate_is_told_before_it_does_it(config):
    """Where the run goes on in its warm-up the rate is the same; where it would have ended it is
    not."""

    def with_(**changes: int) -> RunConfig:
        return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, **changes))

    end = config.schedule.total_tokens
    early = config.schedule.warmup_tokens // 2
    twice = with_(total_tokens=2 * end)
    told = _rates(config, twice, early)
    old, new = (schedule.lr(end) for schedule in (config.schedule, twice.schedule))
    assert told.startswith(f"learning rate at {end:,} tokens: {old:.3g} -> {new:.3g}; schedule.dec")
    assert _rates(config, with_(total_tokens=2 * end, decay_tokens=end), early) == ""


def test_another_run_is_refused_and_may_be_allowed(run, config, engine, caplog):
    other = dataclasses.replace(
        config, seed=2, schedule=dataclasses.replace(config.schedule, peak_lr=1e-3)
    )
    with pytest.raises(UsageError) as caught:
        resume(run, other, engine, str)
    lines = str(caught.value).splitlines()
    assert "was saved by another run (saved -> asked):" in lines[0]
    assert lines[1:5] == [
        "  - seed: 1 -> 2",
        "  - schedule.peak_lr: 0.003 -> 0.001",
        "  - learning rate at 15,360 tokens: 0.0003 -> 0.0001",
        "  - data: other shards or weights than the checkpoint was trained on",
    ]
    assert "--allow-changes" in lines[5]
    assert resume(run, other, engine, str, allow_changes=True) is not None
    assert "the run goes on changed" in caplog.text


def test_what_only_changes_speed_is_no_difference(config):
    other = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, ds_config="zero3", micro_batch=1),
        checkpoint=dataclasses.replace(config.checkpoint, keep_last=9),
        output="elsewhere",
    )
    assert differences(config, other) == []


def test_another_model_is_never_loaded(run, config, engine):
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=16))
    made = build_engine(small, Layout(), Ranks(), resolve(small, Layout(), read_ds_config("zero1")))
    with pytest.raises(UsageError, match="has shape .* opens only with the .model. it was trained"):
        resume(run, small, made, fingerprint(run), allow_changes=True)
    made.close()

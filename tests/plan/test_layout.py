"""Rank numbering against DeepSpeed's own, and every reason why a layout cannot carry a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config import RunConfig, parse_run
from megagpt.plan.layout import (
    Layout,
    accumulation_steps,
    busy_start_tokens,
    idle_share,
    layout_of,
    layout_problems,
    micro_batch_of,
    padded_model,
)

RUN = """
output = "x"
[model]
n_layer = 4
n_head = 4
d_model = 32
n_ctx = 16
vocab_size = 100
[data]
train = [{ path = "x" }]
[schedule]
total_tokens = 4096
peak_lr = 1e-3
batch_tokens = 512
ramp_start_tokens = 128
ramp_tokens = 2048
"""


def config(*overrides: str) -> RunConfig:
    return parse_run(RUN, overrides)


@pytest.mark.parametrize("pipeline", [1, 2, 3])
@pytest.mark.parametrize("data", [1, 2, 4])
@pytest.mark.parametrize("tensor", [1, 2])
def test_ranks_are_numbered_as_deepspeed_numbers_them(pipeline, data, tensor):
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    oracle = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    layout = Layout(world=pipeline * data * tensor, pipeline=pipeline, tensor=tensor)
    assert layout.data == data
    for rank in range(layout.world):
        place = oracle.get_coord(rank)
        found = (layout.stage(rank), layout.data_rank(rank), layout.tensor_rank(rank))
        assert found == (place.pipe, place.data, place.model)


def test_only_pipelines_and_tensor_splits_need_the_pipeline_engine():
    assert not Layout(world=8).pipelined
    assert Layout(world=2, pipeline=2).pipelined
    assert Layout(world=2, tensor=2).pipelined


def test_names_of_layouts():
    assert str(Layout()) == "1 rank"
    assert str(Layout(world=4)) == "4 ranks = data 4"
    full = Layout(world=8, pipeline=2, tensor=2)
    assert str(full) == "8 ranks = pipeline 2 x data 2 x tensor 2"


def test_each_step_takes_the_largest_micro_batch_that_divides_a_ranks_share():
    run = config("parallel.micro_batch=12")
    layout = layout_of(run, 2)
    # 8, 16, 24 and 32 sequences on two ranks: 4, 8, 12 and 16 each.
    batches = [8 * 16, 16 * 16, 24 * 16, 32 * 16]
    assert [micro_batch_of(run, layout, tokens) for tokens in batches] == [4, 8, 12, 8]
    assert [accumulation_steps(run, layout, tokens) for tokens in batches] == [1, 1, 1, 2]
    small = config("parallel.micro_batch=2")
    assert [accumulation_steps(small, layout, tokens) for tokens in batches] == [2, 4, 6, 8]
    # The largest number up to 3 that divides 8: a micro-batch that divides nothing is no error.
    assert micro_batch_of(config("parallel.micro_batch=3"), layout_of(run, 1), 128) == 2
    # "As much as there is" is answered at once.
    assert micro_batch_of(config("parallel.micro_batch=2000000000"), layout, batches[-1]) == 16


@given(sequences=st.integers(1, 400), data=st.integers(1, 64), most=st.integers(1, 24))
def test_every_sample_has_its_pass_and_no_rank_waits_for_long(sequences, data, most):
    run = config(f"parallel.micro_batch={most}")
    layout, tokens = layout_of(run, data), 16 * sequences
    size = micro_batch_of(run, layout, tokens)
    passes = accumulation_steps(run, layout, tokens)
    idle = idle_share(run, layout, tokens)
    assert 1 <= size <= most and sequences % size == 0
    assert (passes - 1) * size * data < sequences <= passes * size * data
    assert 0 <= idle < 1 and sequences == pytest.approx((1 - idle) * passes * size * data)
    if sequences % data == 0:
        share = sequences // data
        assert idle == 0 and size == max(m for m in range(1, most + 1) if share % m == 0)
    else:
        assert size * passes <= -(-sequences // data)


def test_a_sound_layout_has_no_problems():
    run = config("parallel.pipeline=4", "parallel.tensor=2", "parallel.micro_batch=2")
    assert list(layout_problems(run, layout_of(run, 16))) == []
    # More data ranks than the first batch has sequences, or than divide it.
    assert list(layout_problems(config(), layout_of(config(), 16))) == []
    assert busy_start_tokens(config(), layout_of(config(), 16)) == 256
    assert busy_start_tokens(config(), layout_of(config(), 4)) == 128
    assert busy_start_tokens(config(), layout_of(config(), 24)) is None


def test_the_vocabulary_is_padded_for_tensor_cores_on_every_rank():
    rows = [padded_model(config(), Layout(world=n, tensor=n)).embedding_rows for n in (1, 2, 4)]
    assert rows == [128, 256, 512]
    own = config("model.vocab_multiple=96")
    assert padded_model(own, Layout()).embedding_rows == 384
    whole = config("model.vocab_size=50304")
    assert padded_model(whole, Layout(world=8)).embedding_rows == 50_304
    # No tensor core multiplies fp32 matrices.
    exact = config("parallel.dtype=fp32")
    assert padded_model(exact, Layout()).embedding_rows == 100
    assert padded_model(exact, Layout(world=8, tensor=8)).embedding_rows == 104


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (
            6,
            ["parallel.pipeline=2", "parallel.tensor=2"],
            "6 ranks: must be a positive multiple of pipeline x tensor (2 x 2 = 4)",
        ),
        (
            24,
            [],
            "schedule.batch_tokens = 512: the run's last batch has 32 sequences, which must be a "
            "multiple of the 24 data ranks that share it; use 16 or 32 ranks, or a batch of 384 or "
            "768 tokens",
        ),
        (
            96,
            ["parallel.tensor=2"],
            "multiple of the 48 data ranks that share it; use 64 ranks, or a batch of 768 tokens",
        ),
        (
            5,
            ["parallel.pipeline=5"],
            "parallel.pipeline = 5: must not be more than model.n_layer (4)",
        ),
        (8, ["parallel.tensor=8"], "parallel.tensor = 8: must divide model.n_head (4)"),
        (3, ["parallel.tensor=3"], "parallel.tensor = 3: must divide model.d_model (32)"),
    ],
)
def test_what_cannot_work_is_named(world, overrides, message):
    run = config(*overrides)
    found = list(layout_problems(run, layout_of(run, world)))
    assert any(message in problem for problem in found), found


def test_other_families_have_no_pipeline():
    text = RUN.replace("[model]", '[model]\nfamily = "gpt1"')
    run = parse_run(text, ["parallel.pipeline=2"])
    assert any(
        "model.family = 'gpt1': pipeline and tensor parallel carry GPT-2 and GPT-3 only" in p
        for p in layout_problems(run, layout_of(run, 2))
    )

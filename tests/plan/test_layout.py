"""Rank numbering against DeepSpeed's own, and every reason why a layout cannot carry a run."""

import pytest

from megagpt.config import RunConfig, parse_run
from megagpt.plan.layout import Layout, accumulation_steps, layout_of, layout_problems

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


def test_passes_of_a_step_follow_the_ramp():
    run = config("parallel.micro_batch=2")
    layout = layout_of(run, 2)
    assert [accumulation_steps(run, layout, tokens) for tokens in (128, 256, 512)] == [2, 4, 8]


def test_a_sound_layout_has_no_problems():
    run = config("parallel.pipeline=4", "parallel.tensor=2", "parallel.micro_batch=2")
    assert list(layout_problems(run, layout_of(run, 16))) == []


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (
            6,
            ["parallel.pipeline=2", "parallel.tensor=2"],
            "6 ranks: must be a positive multiple of pipeline x tensor (2 x 2 = 4)",
        ),
        (
            1,
            ["parallel.micro_batch=3"],
            "schedule.ramp_increment_tokens = 128 (8 sequences): must be a multiple of data ranks "
            "x micro_batch (1 x 3)",
        ),
        (
            16,
            [],
            "schedule.ramp_increment_tokens = 128 (8 sequences): must be a multiple of data ranks "
            "x micro_batch (16 x 1)",
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

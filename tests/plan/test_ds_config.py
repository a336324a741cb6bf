"""ds_configs: each file resolves on each layout, or is refused with its reason."""

import json
import operator
from typing import Any

import pytest

from megagpt.config import RunConfig, parse_run
from megagpt.config.flops import parameters
from megagpt.errors import UsageError
from megagpt.plan.ds_config import FOLDER, read_ds_config, resolve
from megagpt.plan.layout import Layout, padded_model
from tests.lib.distributed import ROOT
from tests.plan.test_layout import RUN

FILES = sorted(path.stem for path in FOLDER.glob("*.json"))
LAYOUTS = {
    "one": Layout(),
    "data": Layout(world=2),
    "pipeline": Layout(world=2, pipeline=2),
    "tensor": Layout(world=2, tensor=2),
    "all": Layout(world=8, pipeline=2, tensor=2),
}


BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def config_for(layout: Layout, *overrides: str) -> RunConfig:
    split = [f"parallel.pipeline={layout.pipeline}", f"parallel.tensor={layout.tensor}"]
    return parse_run(RUN, [*split, *overrides])


def resolved(name: str, layout: Layout, *overrides: str) -> dict[str, Any]:
    run = config_for(layout, f"parallel.ds_config={name}", *overrides)
    return resolve(run, layout, read_ds_config(name))


def refusal(tree: dict[str, Any], layout: Layout, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(config_for(layout, *overrides), layout, tree)
    assert caught.value.exit_code == 2
    return str(caught.value)


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [tree]


def test_the_files_are_those_of_the_design():
    names = "pipeline zero0 zero1 zero2 zero3 zero3_nvme zero3_offload".split()
    assert names == FILES


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("name", FILES)
def test_each_file_on_each_layout(name, where, dtype):
    layout, tree = LAYOUTS[where], read_ds_config(name)
    stage = tree["zero_optimization"]["stage"]
    pipelined_wrongly = layout.pipelined and stage != 1
    imprecise = stage == 0 and dtype != "fp32"
    offloaded = "offload_optimizer" in tree["zero_optimization"]
    if pipelined_wrongly or imprecise:
        found = refusal(tree, layout, f"parallel.dtype={dtype}")
        assert (f"zero_optimization.stage = {stage} with pipeline" in found) == pipelined_wrongly
        assert ("spoils Adam's bias correction" in found) == imprecise
        lost = layout.pipelined and offloaded and dtype != "fp32"
        assert ("loses the tied embedding's gradient" in found) == lost
        return
    made = resolved(name, layout, f"parallel.dtype={dtype}")
    assert "auto" not in leaves(made)
    # DeepSpeed's own rule between the three.
    assert made["train_batch_size"] == (
        made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * layout.data
    )
    assert made["gradient_clipping"] == 1.0
    assert made["bf16"]["enabled"] == (dtype == "bf16")
    assert made["fp16"]["enabled"] == (dtype == "fp16")
    # What is added up in fp32 travels in fp32.
    kind = "fp16" if dtype == "fp16" and stage == 1 else "fp32"
    assert made.get("communication_data_type", "fp32") == kind
    # DeepSpeed's timer would wait for the GPU around each pass.
    assert made["timers"]["throughput"]["enabled"] is False


@pytest.mark.parametrize("name", [name for name in FILES if name != "zero3_nvme"])
def test_deepspeed_itself_takes_what_is_resolved(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    made = resolved(name, Layout(), "parallel.dtype=fp32", "optimizer.gradient_clipping=0.5")
    taken = DeepSpeedConfig(made)
    assert taken.train_batch_size == 8
    assert taken.gradient_clipping == 0.5
    assert taken.zero_optimization_stage == made["zero_optimization"]["stage"]


RELIED_ON = {
    "managed_gradient_accumulation": True,
    "gradient_allreduce_op": "mean",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "bfloat16_config.check_grad_overflow": True,
    "bfloat16_config.bf16_master_weights_and_grads": False,
    "bfloat16_config.bf16_optimizer_states": False,
    "float16_config.fp16_master_weights_and_grads": False,
    "float16_config.loss_scale": 0,
    "float16_config.auto_cast": False,
    "float16_config.consecutive_hysteresis": False,
    "torch_autocast_enabled": False,
    "zero_config.contiguous_gradients": True,
    "zero_config.use_multi_rank_bucket_allreduce": True,
    "zero_config.allgather_partitions": True,
    "zero_config.compute_grad_norm": True,
    "zero_config.round_robin_gradients": False,
    "zero_config.parameter_alignment": False,
    "zero_config.ignore_unused_parameters": True,
    "zero_config.zero_hpz_partition_size": 1,
    "zero_config.zero_quantized_weights": False,
    "zero_config.zero_quantized_gradients": False,
    "zero_config.zero_quantized_nontrainable_weights": False,
    "zero_config.memory_efficient_linear": True,
    "zero_config.override_module_apply": True,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "dump_state": False,
}
"""DeepSpeed's defaults that docs/reference/ds-configs.md says the files rely on, by attribute."""


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "pipeline"])
def test_the_defaults_that_the_files_rely_on(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    layout = Layout(world=2, pipeline=2) if name == "pipeline" else Layout()
    taken = DeepSpeedConfig(resolved(name, layout))
    found = {key: operator.attrgetter(key)(taken) for key in RELIED_ON}
    assert found == RELIED_ON
    split = {"pipe_partitioned": True, "grad_partitioned": True, "seed_layers": False}
    assert split.items() <= taken.pipeline.items()
    text = (ROOT / "docs" / "reference" / "ds-configs.md").read_text()
    words = [key.rpartition(".")[2].removesuffix("_enabled") for key in [*RELIED_ON, *split]]
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "pipeline"])
def test_a_bucket_is_no_larger_than_the_model(name):
    layout = Layout(world=2, pipeline=2) if name == "pipeline" else Layout()
    size = resolved(name, layout)["zero_optimization"]["reduce_bucket_size"]
    assert size == parameters(padded_model(config_for(layout), layout)) < 500_000_000


@pytest.mark.parametrize(
    ("tree", "layout", "overrides", "message"),
    [
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            Layout(),
            [],
            'zero_optimization.reduce_bucket_size = "auto": nothing in the run file decides this',
        ),
        (
            {"train_batch_size": 16, "zero_optimization": {"stage": 1}},
            Layout(),
            ["parallel.dtype=fp32"],
            'train_batch_size = 16: the run file says 8; write "auto" here',
        ),
        (
            {"communication_data_type": "bf16", "zero_optimization": {"stage": 2}},
            Layout(),
            [],
            'communication_data_type = "bf16": the run file says "fp32"; write "auto" here',
        ),
        (
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
            Layout(),
            ["parallel.dtype=fp32"],
            "bf16.enabled = true: the run file says false",
        ),
        (
            {"zero_optimization": {"stage": 2}},
            Layout(world=2, pipeline=2),
            [],
            "zero_optimization.stage = 2 with pipeline or tensor parallel: must be 1",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            Layout(world=2, tensor=2),
            [],
            "offload_optimizer with pipeline or tensor parallel and fp32 gradient accumulation",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            Layout(),
            [],
            "zero_optimization.stage = 0 with parallel.dtype = 'bf16'",
        ),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            Layout(),
            [],
            "zero_optimization.round_robin_gradients = true: it mixes up",
        ),
        (
            {"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}},
            Layout(),
            [],
            "optimizer, scheduler: the run file owns them",
        ),
        (
            {"zero_optimization": {"stage": 1}, "scheduler": {"type": "WarmupLR"}},
            Layout(),
            [],
            "optimizer, scheduler: the run file owns them",
        ),
    ],
)
def test_each_refusal_says_why(tree, layout, overrides, message):
    assert message in refusal(tree, layout, *overrides)


def test_a_file_may_not_be_silent_where_deepspeeds_default_differs():
    half = ["optimizer.gradient_clipping=0.5"]
    found = refusal({"zero_optimization": {"stage": 1}}, Layout(), *half)
    for message in (
        'gradient_clipping is missing: the run file says 0.5; add it as "auto"',
        'bf16.enabled is missing: the run file says true; add it as "auto"',
        'data_types.grad_accum_dtype is missing: the run file says "fp32"; add it as "auto"',
        'communication_data_type is missing: the run file says "fp32"; add it as "auto"',
        'train_batch_size is missing: the run file says 8; add it as "auto"',
    ):
        assert message in found
    sound = dict.fromkeys(BATCH, "auto") | {"zero_optimization": {"stage": 1}}
    plain = config_for(Layout(), "parallel.dtype=fp32")
    assert resolve(plain, Layout(), sound)["train_batch_size"] == 8
    # DeepSpeed clips at 1.0 where a file is silent.
    off = ["parallel.dtype=fp32", "optimizer.gradient_clipping=0"]
    assert "gradient_clipping is missing: the run file says 0" in refusal(sound, Layout(), *off)


def test_a_layout_that_cannot_be_is_the_only_problem():
    run = config_for(Layout(world=2, pipeline=2, tensor=2))
    with pytest.raises(UsageError) as caught:
        resolve(run, Layout(world=2, pipeline=2, tensor=2), read_ds_config("pipeline"))
    assert len(str(caught.value).splitlines()) == 2
    assert "2 ranks: must be a positive multiple of pipeline x tensor" in str(caught.value)


def test_every_problem_at_once_the_layouts_too():
    tree = {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}, "scheduler": {}}
    tree |= {"bf16": {"enabled": "auto"}, "data_types": {"grad_accum_dtype": "auto"}}
    half = "optimizer.gradient_clipping=0.5"
    found = refusal(tree, Layout(world=6, pipeline=2), half)
    assert found.startswith("parallel.ds_config = 'zero1', 6 ranks = pipeline 2 x data 3:\n")
    assert len(found.splitlines()) == 7, found
    assert "schedule.batch_tokens = 512" in found


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    tree = dict.fromkeys(BATCH, "auto") | {"gradient_clipping": "auto"}
    path.write_text(json.dumps(tree | {"zero_optimization": {"stage": 1}, "prescale": [1, "x"]}))
    made = resolved(str(path), Layout(), "parallel.dtype=fp32")
    assert (made["gradient_clipping"], made["prescale"]) == (1.0, [1, "x"])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"ds_config = 'zero9': .*zero9.json does not exist; .*"):
        read_ds_config("zero9")
    for text, message in (
        ("{", "not valid JSON: Expecting property name"),
        ("[1]", "must hold one JSON object"),
        ('{"zero_optimization": {"stage": "1"}}', 'stage = "1": must be 0, 1, 2 or 3'),
        ("{}", "zero_optimization.stage = null: must be 0, 1, 2 or 3"),
        ('{"zero_optimization": 1}', "zero_optimization = 1: must be an object"),
        ('{"zero_optimization": {"stage": 1}, "bf16": true}', "bf16 = true: must be an object"),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": true}}',
            "zero_optimization.offload_optimizer = true: must be an object",
        ),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match=message) as caught:
            resolved(str(tmp_path / "bad.json"), Layout(), "parallel.dtype=fp32")
        assert "bad.json" in str(caught.value)

"""Stages and the tensor split: pure parts, and a 175B model's layers on no memory at all."""

import json
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import load_run
from megagpt.config.presets import PRESETS, ModelConfig
from megagpt.engine.pipeline import canonical_name, split_kind
from megagpt.plan.stages import layer_costs, stage_bounds, stage_parameters

GPT3_175B = PRESETS["gpt3-175b"].model


@settings(max_examples=60, deadline=None)
@given(n_layer=st.integers(1, 24), stages=st.integers(1, 8), vocab=st.integers(1, 4000))
def test_every_stage_has_a_block_and_no_split_is_better(n_layer, stages, vocab):
    if stages > n_layer:
        return
    config = ModelConfig(n_layer=n_layer, n_head=1, d_model=16, n_ctx=8, vocab_size=vocab)
    bounds, costs = stage_bounds(config, stages), layer_costs(config)
    assert len(bounds) == stages + 1 and bounds[0] == 0 and bounds[-1] == n_layer + 4
    blocks = [set(range(a, b)) & set(range(2, 2 + n_layer)) for a, b in pairwise(bounds)]
    assert all(blocks)
    worst = max(sum(costs[a:b]) for a, b in pairwise(bounds))
    # All blocks cost the same here, so the best split is known: k blocks on the last stage.
    block, head = costs[2], costs[-1]
    best = min(
        max(k * block + head, -(-(n_layer - k) // (stages - 1)) * block)
        if stages > 1
        else n_layer * block + head
        for k in range(1, n_layer - stages + 2)
    )
    assert worst == pytest.approx(best)


def test_175b_over_16_stages():
    bounds = stage_bounds(GPT3_175B, 16)
    assert [b - a for a, b in pairwise(bounds)] == [8, *[6] * 14, 8]
    whole = sum(stage_parameters(GPT3_175B, 1))
    assert whole == 174_604_259_328


def test_early_stages_hold_no_more_than_late_ones_where_the_pace_allows_it():
    model = PRESETS["gpt3-2.7b"].model
    bounds = stage_bounds(model, 8)
    blocks = [len(set(range(a, b)) & set(range(2, 34))) for a, b in pairwise(bounds)]
    assert blocks == [1, 3, 5, 5, 5, 5, 5, 3]
    # 1 block, embedding and positions instead of 5 blocks with them.
    assert stage_parameters(model, 8)[0] == 212_577_280
    worst = max(sum(layer_costs(model)[a:b]) for a, b in pairwise(bounds))
    assert worst == pytest.approx(sum(layer_costs(model)[12:17]))


BUILD = """
    import os, sys, json, io, contextlib, logging
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    import torch, torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from megagpt.config import load_run
    from megagpt.engine.pipeline import PipelinedGPT, Targets
    from megagpt.engine.tensor import TensorGroup, tensor_parts
    from megagpt.plan.layout import layout_of

    class Weightless(PipelinedGPT):
        def to(self, *_, **__):  # DeepSpeed moves the module to its device; meta stays
            return self

    config = load_run("launch/runs/gpt3-175b.toml", ["parallel.tensor=8"])
    layout = layout_of(config, 1024)
    found = []
    for stage in range(16):
        rank = stage * 64 + 3
        os.environ["WORLD_SIZE"] = "1024"
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=1024)
        deepspeed.comm.comm.cdb = None
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed("fake")
            with torch.device("meta"):
                parts = tensor_parts(TensorGroup(None, layout.tensor_rank(rank), 8))
                model = Weightless(config, layout, parts, Targets())
        assert model.stage_id == layout.stage(rank) == stage
        own = list(model.named(layout, rank))
        found.append([sum(p.numel() for p in model.parameters()), sorted({o.name for o in own})])
        dist.destroy_process_group()
    print(json.dumps(found))
"""


def test_every_stage_of_175b_on_1024_ranks_has_the_parameters_that_the_plan_says():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BUILD)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stages = json.loads(done.stdout.splitlines()[-1])
    assert [count for count, _ in stages] == stage_parameters(padded_175b(), 16, 8)
    names = set().union(*(names for _, names in stages))
    assert len(names) == 96 * 12 + 4
    assert {"wte.weight", "wpe.weight", "h.0.ln_1.bias", "h.95.mlp.c_proj.weight"} <= names


def padded_175b() -> ModelConfig:
    """The 175B run file's model with the vocabulary padded to its tensor split."""
    from megagpt.plan.layout import layout_of, padded_model

    config = load_run("launch/runs/gpt3-175b.toml", ["parallel.tensor=8"])
    return padded_model(config, layout_of(config, 1024))


@pytest.mark.parametrize(
    ("own", "canonical", "kind"),
    [
        ("tied_modules.wte.weight", "wte.weight", "column"),
        ("1.weight", "wpe.weight", "whole"),
        ("2.attn.c_attn.bias", "h.0.attn.c_attn.bias", "qkv"),
        ("3.mlp.c_proj.weight", "h.1.mlp.c_proj.weight", "row"),
        ("3.mlp.c_proj.bias", "h.1.mlp.c_proj.bias", "whole"),
        ("4.bias", "ln_f.bias", "whole"),
    ],
)
def test_names_and_splits(own, canonical, kind):
    assert canonical_name(own, ["wte", "wpe", "h.0", "h.1", "ln_f", "head"]) == canonical
    assert split_kind(canonical) == kind


def test_a_build_for_cuda_runs_a_pipeline_on_a_machine_without_a_gpu(monkeypatch):
    import torch

    from megagpt.engine.pipeline import Targets

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    x, _ = Targets().stash((ids, ids, 1.0))
    assert x.device.type == "cpu"

"""The GPT-3 run files: each opens with its arithmetic, which is computed here again.

After a change of a preset or layout, `python tests/config/test_presets_runs.py` writes them anew.
"""

from pathlib import Path

import pytest

from megagpt.config import RunConfig, load_run
from megagpt.config.flops import flops_per_token, parameters
from megagpt.config.presets import PRESETS
from megagpt.plan.layout import (
    Layout,
    accumulation_steps,
    idle_share,
    layout_of,
    micro_batch_of,
)
from megagpt.plan.memory import activation_bytes, state_bytes

RUNS = Path(__file__).parents[2] / "launch" / "runs"
PLANS = {  # data-parallel ranks, and the share of an H100's peak that we reckon with
    "125m": (8, 0.30),
    "350m": (8, 0.33),
    "760m": (16, 0.36),
    "1.3b": (16, 0.42),
    "2.7b": (16, 0.42),
    "6.7b": (16, 0.42),
    "13b": (16, 0.42),
    "175b": (8, 0.36),
}
PRINTED = {"1.3b": "1,320M", "2.7b": "2,650M", "6.7b": "6,660M", "13b": "12,850M"}
PRINTED |= {"125m": "125M", "350m": "356M", "760m": "760M", "175b": "174,600M"}
H100 = 989e12
"""FLOP/s, dense bf16."""


def split_of(size: str, config: RunConfig) -> Layout:
    """The ranks that the run file is for."""
    return layout_of(config, PLANS[size][0] * config.parallel.pipeline * config.parallel.tensor)


def header(size: str, config: RunConfig) -> str:
    """The comment lines that a run file opens with."""
    data, mfu = PLANS[size]
    schedule, layout, largest = config.schedule, config.parallel, config.parallel.micro_batch
    ranks = split_of(size, config)
    gpus = ranks.world
    ramp = sum(s.n_steps for s in schedule.segments if s.first_tokens < schedule.ramp_tokens)
    a_token = flops_per_token(config.model)
    flops = a_token * schedule.total_tokens
    hours = flops / (H100 * mfu) / 3600
    states, activations = state_bytes(config, ranks, 1), activation_bytes(config, ranks, largest)
    split = f"data {data} x pipeline {layout.pipeline} x tensor {layout.tensor}"
    lines = [
        f"GPT-3 {size.upper()} (Brown et al. 2020, Table 2.1 and Appendix B), from scratch.",
        "",
        f"Parameters  {parameters(config.model):,} (the paper prints {PRINTED[size]})",
        f"Tokens      {schedule.total_tokens:,} in windows of {config.model.n_ctx:,}",
        f"Steps       {schedule.n_steps:,}; the first {ramp:,} ramp the batch from "
        f"{schedule.ramp_start_tokens:,} to {schedule.batch_tokens:,} tokens over "
        f"{schedule.ramp_tokens / 1e9:.0f} billion",
        f"FLOPs       {flops:.3e} of the model: {a_token / 1e9:.4g} GFLOP a token, causal "
        "attention counted in full",
        f"GPUs        {gpus:,} = {split}",
        f"GPU-hours   {hours:,.0f} on H100 if {mfu:.0%} of 989 TFLOP/s were reached throughout "
        f"({hours / gpus / 24:.1f} days); assumed, not measured",
        f"Memory      {states / 1e9:.1f} GB a GPU for weights, gradients and optimizer, "
        f"{activations / 1e9:.1f} GB for activations with micro-batches of {largest}",
    ]
    assert all(len(line) <= 118 for line in lines)
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


@pytest.mark.parametrize("size", PLANS)
def test_the_header_is_right(size):
    path = RUNS / f"gpt3-{size}.toml"
    assert path.read_text().startswith(header(size, load_run(path)))


@pytest.mark.parametrize("size", PLANS)
def test_the_run_is_the_papers(size):
    config = load_run(RUNS / f"gpt3-{size}.toml")
    row = PRESETS[f"gpt3-{size}"]
    assert (config.preset, config.model) == (f"gpt3-{size}", row.model)
    assert config.schedule.total_tokens == 300e9
    assert sum(source.weight for source in config.data.train) == pytest.approx(1.01)
    assert config.model.n_head % config.parallel.tensor == 0


@pytest.mark.parametrize("size", PLANS)
def test_the_micro_batch_is_as_large_as_the_card_allows(size):
    config = load_run(RUNS / f"gpt3-{size}.toml")
    layout, most = split_of(size, config), config.parallel.micro_batch
    schedule = config.schedule
    # Every batch of the ramp divides over the ranks, and the full one by the micro-batch.
    assert not any(idle_share(config, layout, s.batch_tokens) for s in schedule.segments)
    assert micro_batch_of(config, layout, schedule.batch_tokens) == most
    # A quarter of 80 GB is left for what is not reckoned: buffers, fragments, NCCL.
    assert memory(config, layout, most) < 60e9
    passes = accumulation_steps(config, layout, schedule.batch_tokens)
    if layout.pipeline > 1:
        # Stages wait for (stages - 1) passes of each step: at most 11% of it.
        assert passes >= 8 * layout.pipeline
    larger = 2 * most
    full = memory(config, layout, larger) > 60e9
    assert full or passes % 2 or passes // 2 < max(2, 8 * layout.pipeline)


def memory(config: RunConfig, layout: Layout, micro_batch: int) -> float:
    """Bytes on the fullest GPU under ZeRO-1."""
    return state_bytes(config, layout, 1) + activation_bytes(config, layout, micro_batch)


@pytest.mark.parametrize(
    ("size", "gigabytes"),
    [("125m", 0.64), ("350m", 1.71), ("760m", 2.57), ("1.3b", 3.42), ("2.7b", 5.70)],
)
def test_hand_numbers_of_a_sequences_activations(size, gigabytes):
    config = load_run(RUNS / f"gpt3-{size}.toml")
    two, one = (activation_bytes(config, Layout(), n) for n in (2, 1))
    logits = 2 * config.model.n_ctx * config.model.vocab_size
    assert (two - one - logits) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    # Weights, fp32 gradients, master and moments: 18 bytes a parameter on one rank.
    parameters = padded_parameters(config)
    assert state_bytes(config, Layout(), 1) == 18 * parameters
    assert state_bytes(config, Layout(world=4), 1) == 9 * parameters
    assert state_bytes(config, Layout(world=4), 2) == 6 * parameters
    assert state_bytes(config, Layout(world=4), 3) == 4.5 * parameters


def padded_parameters(config: RunConfig) -> int:
    """Parameters with the vocabulary of 50,257 padded to 50,304."""
    return parameters(config.model) + (50_304 - 50_257) * config.model.d_model


def test_175b_takes_1024_gpus():
    layout = load_run(RUNS / "gpt3-175b.toml").parallel
    assert (layout.tensor, layout.pipeline) == (8, 16)
    assert PLANS["175b"][0] * layout.tensor * layout.pipeline == 1024


if __name__ == "__main__":
    for name in PLANS:
        run = RUNS / f"gpt3-{name}.toml"
        body = run.read_text().split('model = "', 1)[1]
        run.write_text(header(name, load_run(run)) + 'model = "' + body)

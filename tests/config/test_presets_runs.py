"""The GPT-3 run files: each opens with its arithmetic, which is computed here again.

After a change of a preset or layout, `python tests/config/test_presets_runs.py` writes them anew.
"""

from pathlib import Path

import pytest

from megagpt.config import RunConfig, load_run
from megagpt.config.flops import flops_per_token, layer_parameters, parameters
from megagpt.config.presets import PRESETS

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


def header(size: str, config: RunConfig) -> str:
    """The comment lines that a run file opens with."""
    data, mfu = PLANS[size]
    schedule, layout = config.schedule, config.parallel
    gpus = data * layout.pipeline * layout.tensor
    ramp = sum(s.n_steps for s in schedule.segments if s.first_tokens < schedule.ramp_tokens)
    a_token = flops_per_token(config.model)
    flops = a_token * schedule.total_tokens
    hours = flops / (H100 * mfu) / 3600
    states, activations = memory(config, data)
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
        f"Memory      {states:.1f} GB a GPU for weights, gradients and optimizer, "
        f"{activations:.1f} GB for activations",
    ]
    assert all(len(line) <= 118 for line in lines)
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def memory(config: RunConfig, data: int) -> tuple[float, float]:
    """GB of the first stage: states under ZeRO-1, and activations (Korthikanti et al. 2022).

    A parameter takes 2 bytes of weight, 2 of gradient, 4 of accumulated gradient and 12 / data of
    master and moments. A block keeps s b d (10 + 24 / tensor) bytes with a fused attention, or
    its input of 2 s b d where it is recomputed, for each micro-batch in flight.
    """
    model, layout = config.model, config.parallel
    blocks = -(-model.n_layer // layout.pipeline)
    embeddings = (model.embedding_rows + model.n_ctx) * model.d_model
    held = (blocks * layer_parameters(model) + embeddings) / layout.tensor
    sbd = model.n_ctx * layout.micro_batch * model.d_model
    whole = sbd * (10 + 24 / layout.tensor)
    each = 2 * sbd if layout.recompute == "full" else whole
    activations = each * blocks * layout.pipeline + (whole if layout.recompute == "full" else 0)
    return held * (8 + 12 / data) / 1e9, activations / 1e9


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
    # Every batch of the ramp divides over the ranks.
    sequences = config.schedule.increment_tokens // config.model.n_ctx
    assert sequences % (PLANS[size][0] * config.parallel.micro_batch) == 0
    assert config.model.n_head % config.parallel.tensor == 0
    assert sum(memory(config, PLANS[size][0])) < 60


def test_175b_takes_1024_gpus():
    layout = load_run(RUNS / "gpt3-175b.toml").parallel
    assert (layout.tensor, layout.pipeline) == (8, 16)
    assert PLANS["175b"][0] * layout.tensor * layout.pipeline == 1024


if __name__ == "__main__":
    for name in PLANS:
        run = RUNS / f"gpt3-{name}.toml"
        body = run.read_text().split('model = "', 1)[1]
        run.write_text(header(name, load_run(run)) + 'model = "' + body)

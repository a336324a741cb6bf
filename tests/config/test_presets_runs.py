"""The GPT-3 run files: each opens with what the planner says of it, and has the layout that the
planner chooses for its GPUs.

After a change of a preset or of the planner, `python tests/config/test_presets_runs.py` writes both
anew.
"""

import re
from pathlib import Path

import pytest

from megagpt.config import RunConfig, load_run
from megagpt.config.flops import flops_per_token, parameters
from megagpt.config.presets import PRESETS
from megagpt.plan.candidates import Cluster, candidate
from megagpt.plan.constants import CONSTANTS
from megagpt.plan.judge import Judgement, judge, search
from megagpt.plan.layout import micro_batch_of

RUNS = Path(__file__).parents[2] / "launch" / "runs"
GPUS = {"125m": 8, "350m": 8, "760m": 16, "1.3b": 16, "2.7b": 32, "6.7b": 64, "13b": 128}
GPUS |= {"175b": 1024}
PRINTED = {"1.3b": "1,320M", "2.7b": "2,650M", "6.7b": "6,660M", "13b": "12,850M"}
PRINTED |= {"125m": "125M", "350m": "356M", "760m": "760M", "175b": "174,600M"}


def cluster(size: str) -> Cluster:
    """The GPUs that the run file names."""
    return Cluster(gpu="h100", gpus=GPUS[size])


def judged(size: str, config: RunConfig) -> Judgement:
    """What the planner says of the run file on its GPUs."""
    return judge(candidate(config, GPUS[size]), cluster(size))


def header(size: str, config: RunConfig) -> str:
    """The comment lines that a run file opens with."""
    schedule, one = config.schedule, judged(size, config)
    layout, device = one.candidate.layout, one.cluster.device
    ramp = sum(s.n_steps for s in schedule.segments if s.first_tokens < schedule.ramp_tokens)
    a_token = flops_per_token(config.model)
    fullest = max(one.stages, key=lambda stage: sum(stage.values()))
    states = sum(fullest[name] for name in ("weights", "gradients", "optimizer"))
    kept = fullest["activations"] + fullest["logits"]
    low, high = one.time_ends
    least, most = (one.peak * end / 1e9 for end in one.memory_ends)
    lines = [
        f"GPT-3 {size.upper()} (Brown et al. 2020, Table 2.1 and Appendix B): an example.",
        "Its five corpora are the paper's mixture; WebText2 and the books were never published.",
        "gpt3-125m-fineweb.toml and gpt3-1.3b-fineweb.toml beside it train on data that was.",
        "",
        f"Parameters  {parameters(config.model):,} (the paper prints {PRINTED[size]})",
        f"Tokens      {schedule.total_tokens:,} in windows of {config.model.n_ctx:,}",
        f"Steps       {schedule.n_steps:,}; the first {ramp:,} ramp the batch from "
        f"{schedule.ramp_start_tokens:,} to {schedule.batch_tokens:,} tokens over "
        f"{schedule.ramp_tokens / 1e9:.0f} billion",
        f"FLOPs       {a_token * schedule.total_tokens:.3e} of the model: {a_token / 1e9:.4g} "
        "GFLOP a token, causal attention counted in full",
        f"GPUs        {GPUS[size]:,} H100 = data {layout.data} x pipeline {layout.pipeline} x "
        f"tensor {layout.tensor}; what `megagpt plan --search` chooses for them",
        f"GPU-hours   {one.gpu_hours:,.0f} ({one.days:.1f} days; 80%: {one.days * low:.1f} to "
        f"{one.days * high:.1f}) at {one.utilisation('none'):.0%} of {device.tflops:.0f} TFLOP/s; "
        "predicted, not measured",
        f"Memory      {one.peak / 1e9:.1f} GB a GPU (80%: {least:.1f} to {most:.1f}): "
        f"{states / 1e9:.1f} for weights and optimizer, {kept / 1e9:.1f} for "
        "activations and logits",
    ]
    assert all(len(line) <= 118 for line in lines), lines
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


@pytest.mark.parametrize("size", GPUS)
def test_the_header_is_right(size):
    path = RUNS / f"gpt3-{size}.toml"
    assert path.read_text().startswith(header(size, load_run(path)))


@pytest.mark.parametrize("size", GPUS)
def test_the_run_is_the_papers(size):
    config = load_run(RUNS / f"gpt3-{size}.toml")
    row = PRESETS[f"gpt3-{size}"]
    assert (config.preset, config.model) == (f"gpt3-{size}", row.model)
    assert config.schedule.total_tokens == 300e9
    assert sum(source.weight for source in config.data.train) == pytest.approx(1.01)
    assert config.model.n_head % config.parallel.tensor == 0


@pytest.mark.parametrize("size", GPUS)
def test_the_layout_is_the_one_that_the_planner_chooses(size):
    config = load_run(RUNS / f"gpt3-{size}.toml")
    best, *_ = search(config, cluster(size))
    assert best.candidate.keys == candidate(config, GPUS[size]).keys
    one = judged(size, config)
    assert one.fits and one.surely_fits and one.step == best.step
    # The full batch is taken by whole micro-batches on every rank.
    full = config.schedule.batch_tokens
    assert micro_batch_of(config, one.candidate.layout, full) == config.parallel.micro_batch


@pytest.mark.parametrize(
    ("size", "gigabytes"),
    [("125m", 0.64), ("350m", 1.71), ("760m", 2.57), ("1.3b", 3.42), ("2.7b", 5.70)],
)
def test_hand_numbers_of_a_sequences_activations(size, gigabytes):
    alone = ["parallel.pipeline=1", "parallel.tensor=1", "parallel.recompute=none"]
    kept = []
    for micro in (1, 2):
        words = [*alone, f"parallel.micro_batch={micro}", "parallel.ds_config=zero1"]
        config = load_run(RUNS / f"gpt3-{size}.toml", words)
        [stage] = judge(candidate(config, 1), Cluster(gpu="b200", gpus=1)).stages
        kept.append(stage["activations"])
    assert (kept[1] - kept[0]) / 1e9 / CONSTANTS["activations"] == pytest.approx(
        gigabytes, rel=0.01
    )
    # Weights, fp32 gradients, the copy of a rank's own part of them, master and moments: 22 bytes
    # a parameter on one rank; ZeRO shares out 16 of them, then gradients (without the copy), then
    # weights (with it).
    for ranks, stage, each in ((1, 1, 22), (4, 1, 10), (4, 2, 6), (4, 3, 5.5)):
        config = load_run(
            RUNS / f"gpt3-{size}.toml", [*alone[:2], f"parallel.ds_config=zero{stage}"]
        )
        [found] = judge(candidate(config, ranks), Cluster(gpu="b200", gpus=ranks)).stages
        states = sum(found[name] for name in ("weights", "gradients", "optimizer"))
        assert states == each * padded_parameters(config)


def padded_parameters(config: RunConfig) -> int:
    """Parameters with the vocabulary of 50,257 padded to 50,304."""
    return parameters(config.model) + (50_304 - 50_257) * config.model.d_model


if __name__ == "__main__":
    for name in GPUS:
        path = RUNS / f"gpt3-{name}.toml"
        body = path.read_text().split('model = "', 1)[1]
        [chosen, *_] = search(load_run(path), cluster(name))
        parallel = chosen.candidate.config.parallel
        keys = ["ds_config", "micro_batch"]
        keys += [key for key in ("pipeline", "tensor") if getattr(parallel, key) > 1]
        keys += ["recompute"] if parallel.recompute != "none" else []
        lines = [
            f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"
            for key, value in ((key, getattr(parallel, key)) for key in keys)
        ]
        section = "[parallel]\n" + "\n".join(lines) + "\n\n"
        body = re.sub(r"\[parallel\]\n.*?(?=\[checkpoint\])", section, body, flags=re.DOTALL)
        path.write_text('model = "' + body)
        path.write_text(header(name, load_run(path)) + path.read_text())

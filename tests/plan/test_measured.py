"""Step time and memory of small models on CPU ranks, predicted after --calibrate on one of them.

Another size and other layouts than the one that was calibrated on; one thread a rank, fp32.
It prints the table of docs/how-to/planner.md. Other work on the machine spoils it.
"""

import statistics

import pytest

from megagpt.cli import main
from megagpt.config import load_run
from megagpt.plan.candidates import Cluster, candidate
from megagpt.plan.judge import judge
from megagpt.plan.layout import Layout
from tests.lib.corpus import run_file
from tests.lib.distributed import trained

SMALL = {"n_layer": 4, "n_head": 4, "d_model": 256, "n_ctx": 64, "attention": ["dense"]}
LARGE = {"n_layer": 6, "n_head": 8, "d_model": 512, "n_ctx": 64, "attention": ["dense"]}
DEEP = SMALL | {"n_layer": 8}
ZERO = {"ds_config": "zero1", "micro_batch": 8}
SPLIT = {"ds_config": "pipeline", "micro_batch": 4}
RUNS = {  # model, parallel, ranks, sequences of the first and the full batch
    "calibrated": (SMALL, ZERO, 2, 8, 32),
    "larger": (LARGE, ZERO | {"micro_batch": 4}, 1, 8, 8),
    "larger, ZeRO-1": (LARGE, ZERO | {"micro_batch": 4}, 2, 16, 16),
    "deeper, pipeline": (DEEP, SPLIT | {"pipeline": 2}, 2, 32, 32),
}
STEPS = 8


def record(root, name):
    """The steps of one run that is trained here; (folder, records of its full batch)."""
    model, parallel, ranks, first, full = RUNS[name]
    root.mkdir()
    n_ctx = model["n_ctx"]
    # Some steps of each batch between: micro-batches of several sizes tell launches from products.
    ramp = 3 * 5 * (full - first) * n_ctx if first < full else 0
    file = run_file(
        root,
        model=model,
        parallel=parallel | {"dtype": "fp32"},
        schedule={
            "total_tokens": ramp + STEPS * full * n_ctx,
            "warmup_tokens": n_ctx,
            "batch_tokens": full * n_ctx,
            "ramp_start_tokens": first * n_ctx,
            "ramp_increment_tokens": first * n_ctx,
            "ramp_tokens": ramp,
        },
        checkpoint={"every_tokens": 10**9},
        evaluate={"every_tokens": 10**9, "batches": 1},
        log={"tensorboard": False},
    )
    steps = trained(file, ranks, launcher="torchrun" if ranks > 1 else "python", timeout_s=600)
    return root / "run", [s for s in steps if s["batch_tokens"] == full * n_ctx]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_small_models_on_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEGAGPT_PROFILES", str(tmp_path / "profiles"))
    lines, wrong = [], []
    for name in RUNS:
        folder, steps = record(tmp_path / name.replace(" ", ""), name)
        config, ranks = load_run(folder / "config.toml"), RUNS[name][2]
        if name == "calibrated":
            assert main(["plan", "--calibrate", str(folder), "--gpu", "cpu"]) == 0
        one = judge(candidate(config, ranks), Cluster(gpu="cpu", gpus=ranks))
        seconds = statistics.median(s["step_s"] for s in steps[2:])
        memory = max(s["host_memory_bytes"] for s in steps) / 1e9
        first = sum(one.stages[0].values()) / 1e9
        off = one.step / seconds - 1, first / memory - 1
        lines.append(
            f"| {name} | {Layout(world=ranks, pipeline=config.parallel.pipeline)} | "
            f"{one.step:.3f} s | {seconds:.3f} s | {off[0]:+.0%} | {first:.2f} GB | "
            f"{memory:.2f} GB | {off[1]:+.0%} |"
        )
        if abs(off[0]) > 0.15 or abs(off[1]) > 0.1:
            wrong.append(lines[-1])
        with capsys.disabled():
            print(
                lines[-1],
                {k: round(v, 3) for k, v in one.items.items()},
                [round(s["step_s"], 2) for s in steps],
            )
    assert not wrong, "\n".join(wrong)

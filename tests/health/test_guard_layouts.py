"""The guards under every kind of split: skipped steps, rollbacks, replicas."""

import json
import sys
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints
from tests.lib.corpus import run_file
from tests.lib.distributed import (
    digest_of_weights,
    exact,
    free_port,
    run_together,
    steps,
)
from tests.lib.noise import FAST, SKIPS, SPIKES, journal, with_noise

TOLERANCE = 1e-5
"""Relative, of the loss in fp32."""
RUN = {
    "schedule": FAST | {"total_tokens": 12_288},
    "checkpoint": {"every_tokens": 2048, "keep_last": 99},
    "log": {"tensorboard": False},
    "evaluate": {"every_tokens": 0, "batches": 1},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_noise(run_file(tmp_path_factory.mktemp("noise"), **RUN))


def overrides(action: dict[str, object]) -> list[str]:
    return [f"optimizer.{key}={value}" for key, value in action.items()]


def train(file: Path, ranks: int, hops: list[tuple[object, ...]]) -> None:
    """Trains each hop, see tests/reshape.py, in one group of processes."""
    place = [f"--nproc-per-node={ranks}", f"--master-port={free_port()}", "-m", "tests.lib.reshape"]
    line = [sys.executable, "-m", "torch.distributed.run", *place, str(file), json.dumps(hops)]
    done = run_together(line)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def alone(file: Path) -> Path:
    """Folder of the runs of one process: skip/ and rollback/."""
    root = file.parent / "alone"
    hops = [
        ("", str(root / name), "zero1", 1, 1, *overrides(action))
        for name, action in (("skip", SKIPS), ("rollback", SPIKES))
    ]
    train(file, 1, hops)
    assert len(journal(root / "skip")) > 1 and journal(root / "rollback")
    return root


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("zero3", 1, 1), id="zero3", marks=pytest.mark.slow),
        pytest.param(("pipeline", 2, 1), id="pp2"),
        pytest.param(("pipeline", 1, 2), id="tp2", marks=pytest.mark.slow),
    ],
)
def test_spikes_end_the_same_under_any_split(file: Path, alone: Path, tmp_path: Path, layout):
    first = journal(alone / "skip")[0]["step"]
    saved = [f for f in list_checkpoints(alone / "skip") if f.name < f"step_{first:08d}"][-1]
    source = tmp_path / "skip" / "checkpoints" / saved.name
    train(
        file,
        2,
        [
            ("", str(tmp_path / "skip"), *layout, *overrides(SKIPS)),
            (str(source), str(tmp_path / "resumed"), *layout, *overrides(SKIPS)),
            ("", str(tmp_path / "rollback"), *layout, *overrides(SPIKES)),
        ],
    )
    for name in ("skip", "rollback"):
        # The same steps are left out and the same samples skipped as in one process.
        keys = ("step", "update", "skipped_samples", "spiked_step")
        found, expected = (
            [[e.get(key) for key in keys] for e in journal(run / name)] for run in (tmp_path, alone)
        )
        assert found == expected
        for a, b in zip(steps(tmp_path / name), steps(alone / name), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE)
            assert a["digest"] == b["digest"]
    # What resumes before a step that is skipped is the same run, bit for bit.
    lines = (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()
    resumed = [r for r in map(json.loads, lines) if "loss" in r]
    whole = steps(tmp_path / "skip")
    assert exact(resumed) == exact(whole[-len(resumed) :]) and resumed[0]["step"] <= first
    assert digest_of_weights(tmp_path / "resumed") == digest_of_weights(tmp_path / "skip")
    assert journal(tmp_path / "resumed") == journal(tmp_path / "skip")


def test_one_rank_that_refuses_an_update_speaks_for_all(tmp_path: Path):
    file = run_file(tmp_path)
    place = [
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        "-m",
        "tests.lib.vote",
        str(file),
    ]
    done = run_together([sys.executable, "-m", "torch.distributed.run", *place])
    assert done.returncode == 0, done.stderr
    assert "[(True, True, 0), (True, True, 0)]" in done.stdout


@pytest.mark.parametrize(
    ("pipeline", "tensor", "rank", "name", "other"),
    [
        pytest.param(2, 1, 3, "h.1.mlp.c_fc.weight", 2, id="pp2xdp2"),
        pytest.param(1, 2, 2, "h.0.attn.c_attn.weight", 0, id="tp2xdp2", marks=pytest.mark.slow),
    ],
)
def test_a_flipped_bit_is_caught_in_a_split(tmp_path, pipeline, tensor, rank, name, other):
    parallel = {"ds_config": "pipeline", "pipeline": pipeline, "tensor": tensor, "dtype": "bf16"}
    log = {"check_replicas_every_steps": 2, "tensorboard": False}
    file = run_file(tmp_path, parallel=parallel | {"micro_batch": 1}, log=log)
    place = ["--nproc-per-node=4", f"--master-port={free_port()}", "-m", "tests.lib.corrupt"]
    words = [str(file), str(rank), "4", name]
    done = run_together([sys.executable, "-m", "torch.distributed.run", *place, *words])
    assert "exitcode  : 3" in done.stderr, done.stderr
    assert "after step 4 weights that data-parallel ranks hold in common differ" in done.stderr
    told = f"rank {max(rank, other)} differs from rank {min(rank, other)} in {name} (of two ranks"
    assert told in done.stderr
    assert list_checkpoints(tmp_path / "run") == []

"""What real runs record of themselves: under every layout the same, and without a bit changed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt.health.noise import NoiseScale
from megagpt.log import read_metrics
from megagpt.log.tags import tags
from tests.lib.corpus import run_file
from tests.lib.distributed import (
    EXACT,
    digest_of_weights,
    exact,
    free_port,
    launch,
    run_together,
    steps,
    undisturbed,
)

WATCHED = {
    "log": {"details_every_steps": 3, "profile_steps": [5, 6]},
    "evaluate": {"every_tokens": 8192, "batches": 2, "samples": 2, "sample_tokens": 8},
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run like undisturbed() with everything measured, stopped and resumed; and its stdouts."""
    root = tmp_path_factory.mktemp("watched")
    file = run_file(root, **EXACT, **WATCHED)
    first = launch(file, 2, "checkpoint.stop_after_steps=13")
    assert "at step 13, saved" in first.stderr, first.stderr
    second = launch(file, 2)
    assert second.returncode == 0, second.stderr
    return root / "run", [first.stdout, second.stdout]


def test_measuring_changes_no_bit(watched):
    run, _ = watched
    reference = undisturbed() / "run"
    assert exact(steps(run)) == exact(steps(reference))
    assert digest_of_weights(run) == digest_of_weights(reference)
    evaluated = [[r for r in read_metrics(f) if "validation_loss" in r] for f in (run, reference)]
    assert [e["validation_loss"] for e in evaluated[0]] == [
        e["validation_loss"] for e in evaluated[1]
    ]


def test_stdout_has_results_alone(watched):
    _, (first, second) = watched
    assert first == ""
    said, following = second.split("next: ")
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "run complete", "validation loss", "checkpoints", "curves",
    ]  # fmt: skip
    assert [line.split()[1] for line in following.splitlines()[:3]] == [
        "generate", "report", "export",
    ]  # fmt: skip


def test_a_step_is_made_of_its_parts(watched):
    run, _ = watched
    for record in steps(run):
        parts = [record[f"{p}_s"] for p in ("data", "forward", "backward", "optimizer")]
        parts.append(record["communication_s"])
        assert all(part > 0 for part in parts)
        assert sum(parts) < record["step_s"]
        assert record["tokens_per_s"] == pytest.approx(record["batch_tokens"] / record["step_s"])
        assert record["host_memory_bytes"] > 1 << 20


def test_closer_looks_come_at_their_steps_and_resume(watched):
    run, _ = watched
    noise = NoiseScale()
    for record in steps(run):
        assert ("norms" in record) == ("activations" in record) == (record["step"] % 3 == 0)
        # The running mean goes on behind the stop.
        again = {k: v for k, v in record.items() if k == "noise_scale_tokens"}
        assert noise.add(record) == again
        if "norms" in record:
            gradient = sum(x * x for x in record["norms"]["gradient"].values()) ** 0.5
            assert gradient == pytest.approx(record["grad_norm"], rel=1e-3)
    assert any("noise_scale_tokens" in record for record in steps(run))


def test_tensorboard_has_what_metrics_have(watched):
    run, _ = watched
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(run):
        if "event" not in line:
            for tag, value in tags(line).items():
                expected.setdefault(tag, []).append((line["tokens"], value))
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    for tag, points in expected.items():
        assert found[tag] == [(tokens, pytest.approx(value)) for tokens, value in points], tag
    for tag in ("y_norms/gradient/h.1", "y_activations/rms/ln_f", "x_noise/noise_scale_tokens"):
        assert tag in expected
    bits = "validation/validation_bits_per_byte"
    assert bits in expected and "x_time/checkpoint_stall_s" in found
    assert "more" not in {tag.split("/")[0] for tag in found}
    shown = events.Tensors("samples/1")
    written = sorted((run / "samples").iterdir())
    assert len(shown) == len(written) == len(expected[bits]) >= 3
    assert b"aten::" in events.Tensors("run/profile")[0].tensor_proto.string_val[0]


def test_bits_per_byte_are_those_of_the_text(watched):
    run, _ = watched
    # Byte tokens and END-OF-DOCUMENT: a little more than one token a byte.
    totals = json.loads((run.parent / "validation" / "manifest.json").read_text())["totals"]
    for record in read_metrics(run):
        if "validation_loss" in record:
            bits = record["validation_loss"] / 0.6931471805599453
            expected = bits * totals["tokens"] / totals["text_bytes"]
            assert record["validation_bits_per_byte"] == pytest.approx(expected)
            assert record["evaluate_s"] > 0


def test_the_profile_of_the_first_rank_of_each_stage(watched):
    run, _ = watched
    names = sorted(path.name for path in (run / "profile").iterdir())
    assert names == ["steps_5_6_rank_0.pt.trace.json.gz", "steps_5_6_rank_0.txt"]


# --- layouts ------------------------------------------------------------------------------------

SHORT = {
    "schedule": {
        "total_tokens": 2048,
        "warmup_tokens": 256,
        "peak_lr": 3e-3,
        "batch_tokens": 512,
        "ramp_start_tokens": 256,
        "ramp_tokens": 1024,
    },
    "checkpoint": {"every_tokens": 0},
    "evaluate": {"every_tokens": 0, "batches": 1, "samples": 1, "sample_tokens": 12},
    "log": {"tensorboard": False, "details_every_steps": 2},
}


LAYOUTS = {
    "data": [("zero1", 1, 1), ("zero2", 1, 1), ("zero3", 1, 1)],
    "pipeline": [("pipeline", 2, 1)],
    "tensor": [("pipeline", 1, 2)],
}


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(["pipeline"], id="pipeline"),
        pytest.param(["data", "tensor"], id="others", marks=pytest.mark.slow),
    ],
)
def test_every_layout_measures_the_same(tmp_path, kinds):
    file = run_file(tmp_path, **SHORT)
    layouts = {"one": [("zero0", 1, 1)]} | {kind: LAYOUTS[kind] for kind in kinds}
    for name, hops in layouts.items():
        plan = [("", str(tmp_path / f"{name}-{hop[0]}"), *hop) for hop in hops]
        ranks = f"--nproc-per-node={1 if name == 'one' else 2}"
        place = ["-m", "torch.distributed.run", ranks, f"--master-port={free_port()}"]
        script = ["-m", "tests.lib.reshape", str(file), json.dumps(plan)]
        done = run_together([sys.executable, *place, *script])
        assert done.returncode == 0, done.stderr
    reference = looks(tmp_path / "one-zero0")
    assert len(reference) >= 3
    text = sorted((tmp_path / "one-zero0" / "samples").iterdir())[-1].read_text()
    for name, hops in layouts.items():
        for hop in hops:
            run = tmp_path / f"{name}-{hop[0]}"
            for found, expected in zip(looks(run), reference, strict=True):
                for figure, row in expected["norms"].items():
                    assert found["norms"][figure] == pytest.approx(row, rel=1e-3), (run, figure)
                for key in ("gradient_square", "noise_trace", "param_norm", "update_norm"):
                    assert found[key] == pytest.approx(expected[key], rel=1e-3), (run, key)
                if name != "data":  # there two ranks show their first micro-batch
                    for figure, row in expected["activations"].items():
                        assert found["activations"][figure] == pytest.approx(row, rel=1e-3)
            assert sorted((run / "samples").iterdir())[-1].read_text() == text


def looks(run: Path) -> list[dict[str, Any]]:
    return [record for record in steps(run) if "norms" in record]

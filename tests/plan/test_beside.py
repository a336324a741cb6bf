"""Predicted beside measured: of a run that was planned, of one on a calibrated machine, of none."""

import json

import numpy as np
import pytest
from rich.console import Console

from megagpt.cli import main
from megagpt.config import dump_run, load_run
from megagpt.plan.beside import beside
from megagpt.plan.candidates import Cluster, candidate
from megagpt.plan.constants import CONSTANTS, profile_path
from megagpt.plan.judge import Judgement, judge
from megagpt.report.dashboard import frame
from megagpt.report.page import write_page
from megagpt.report.series import read_run


@pytest.fixture(autouse=True)
def profiles(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAGPT_PROFILES", str(tmp_path / "profiles"))


@pytest.fixture
def planned(tmp_path, capsys):
    """A run file as `megagpt plan --write` leaves it."""
    path = tmp_path / "run.toml"
    path.write_text('model = "gpt3-1.3b"\noutput = "x"\n[data]\ntrain = [{ path = "x" }]\n')
    words = [str(path), "parallel.ds_config=pipeline", "parallel.pipeline=2", "--gpus", "8"]
    assert main(["plan", *words, "--write", str(tmp_path / "plan")]) == 0
    capsys.readouterr()
    return tmp_path / "plan" / "run.toml"


def record(folder, file, device: str, slower: float = 1.0, gpus: int = 8) -> Judgement:
    """A run folder of that run file on a machine that takes `slower` times what is predicted."""
    folder.mkdir()
    config = load_run(file)
    one = judge(candidate(config, gpus), Cluster(gpu="h100", gpus=gpus), CONSTANTS)
    (folder / "config.toml").write_text(dump_run(config))
    facts = {"layout": str(one.candidate.layout), "computing": {"device": device}}
    (folder / "run.json").write_text(json.dumps(facts))
    batch, lines = config.schedule.batch_tokens, []
    for step in range(1, 21):
        parts = {
            "forward_s": (one.items["compute"] + one.items["tensor"]) / 3,
            "backward_s": (one.items["compute"] + one.items["tensor"]) * 2 / 3,
            "communication_s": sum(one.items[k] for k in ("bubble", "pipeline", "data")),
            "optimizer_s": one.items["optimizer"],
            "step_s": one.step,
        }
        seconds = {k: v * slower * (9 if step == 7 else 1) for k, v in parts.items()}
        memory = {"memory_peak_bytes": sum(one.stages[0].values()) * 1.02}
        step_facts = {"step": step, "tokens": step * batch, "batch_tokens": batch, "loss": 3.0}
        more = {"details_s": 1.0, "step_s": 99.0} if step == 9 else {}
        lines.append(json.dumps(step_facts | seconds | memory | more))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return one


def test_a_run_that_was_planned_is_held_against_its_plan(planned, tmp_path):
    one = record(tmp_path / "run", planned, "cuda (NVIDIA H100 80GB HBM3)", slower=1.25)
    run = read_run(tmp_path / "run")
    assert run.config is not None
    found = {item.name: item for item in beside(run.config, run.facts, run.steps)}
    assert list(found) == ["step", "forward and backward", "communication", "optimizer", "memory"]
    for name in list(found)[:-1]:
        assert found[name].off == pytest.approx(0.25), name
    assert found["step"].predicted == pytest.approx(one.step)
    assert found["memory"].off == pytest.approx(0.02)
    low, high = found["step"].ends
    assert low < one.step < high
    page = write_page([run], tmp_path / "report.html").read_text()
    assert "Predicted beside measured" in page and "<td>+25%</td>" in page
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(frame(run, 1e9, 120))
    lines = [line for line in console.export_text().splitlines() if "forward and backward" in line]
    assert len(lines) == 1 and "+25%" in lines[0]


def test_a_calibrated_machine_predicts_runs_without_a_plan(planned, tmp_path):
    (planned.parent / "plan.json").unlink()
    record(tmp_path / "run", planned, "cuda (NVIDIA H100 80GB HBM3)", slower=1.5)
    run = read_run(tmp_path / "run")
    assert run.config is not None and beside(run.config, run.facts, run.steps) == []
    assert main(["plan", "--calibrate", str(tmp_path / "run")]) == 0
    found = {item.name: item for item in beside(run.config, run.facts, run.steps)}
    assert found["step"].off == pytest.approx(0, abs=0.03)
    assert found["memory"].off == pytest.approx(0, abs=0.01)
    # Of other devices nothing is known, nor of a device with a name that no table has.
    for device in ("cuda (NVIDIA A100-SXM4-80GB)", "cuda (Quantum 9)", "cpu", ""):
        facts = run.facts | {"computing": {"device": device}}
        assert beside(run.config, facts, run.steps) == []


def test_what_is_no_plan_leaves_the_curves_alone(planned, tmp_path):
    record(tmp_path / "run", planned, "cpu")
    run = read_run(tmp_path / "run")
    assert run.config is not None
    for text in ("[]", "{", '{"cluster": {"gpu": "h100"}}', '{"cluster": {"gpus": 4, "gpu": "x"}}'):
        (planned.parent / "plan.json").write_text(text)
        assert beside(run.config, run.facts, run.steps) == []
    (planned.parent / "plan.json").unlink()
    profile_path("cpu").parent.mkdir(parents=True)
    profile_path("cpu").write_text("{}")
    assert beside(run.config, run.facts, run.steps) == []
    assert "Predicted" not in write_page([run], tmp_path / "report.html").read_text()
    assert beside(run.config, run.facts, [{"loss": np.nan}]) == []

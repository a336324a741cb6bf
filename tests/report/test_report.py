"""Reports of runs whose figures are known."""

import argparse
import math
from pathlib import Path

import numpy as np
import pytest

from megagpt import cli
from megagpt.errors import UsageError
from megagpt.log import RunLog
from megagpt.log.metrics import encode
from megagpt.log.units import scientific
from megagpt.report.charts import charts
from megagpt.report.picture import draw_runs
from megagpt.report.series import read_facts, read_run, read_runs, smooth, thin
from megagpt.report.table import facts

CONFIG = """
model = "gpt3-125m"
output = "runs/x"

[data]
train = [{ path = "data/web" }]
"""


def make_run(folder: Path, n_steps: int = 60, restart: bool = False) -> Path:
    def steps(log: RunLog, first: int, last: int) -> None:
        for step in range(first, last + 1):
            log.step(
                {"step": step, "tokens": step * 1000, "samples": step, "loss": 9.0 / step**0.3}
                | {"lr": 1e-3, "batch_tokens": 1000, "grad_norm": 1.0}
                | {"tokens_per_s": 2000.0, "step_s": 0.5}
            )
            if step % 20 == 0:
                log.evaluation(
                    {"step": step, "tokens": step * 1000, "validation_loss": 9.0 / step**0.3}
                )

    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    options = {"total_tokens": n_steps * 1000, "tensorboard": False, "console": "off"}
    log = RunLog(folder, resume_tokens=0, resume_step=0, **options)
    steps(log, 1, n_steps // 2 if restart else n_steps)
    log.close()
    if restart:
        at = n_steps // 2 - 10
        log = RunLog(folder, resume_tokens=at * 1000, resume_step=at, **options)
        steps(log, at + 1, n_steps)
        log.close()
    return folder


def parse(*words: object) -> argparse.Namespace:
    return cli.parser("report").parse_args(["report", *map(str, words)])


def draw(folder: Path) -> Path:
    return draw_runs([read_run(folder)], folder / "report.png")


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_draw_makes_a_picture(tmp_path):
    folder = make_run(tmp_path / "run", restart=True)
    assert is_png(draw(folder))


def test_a_run_of_one_step_without_configuration_can_be_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(encode({"step": 1, "tokens": 10, "loss": 3.0}))
    assert is_png(draw(tmp_path))


@pytest.mark.parametrize("absent", ["loss", "validation_loss"])
def test_losses_that_are_never_finite_are_left_out(tmp_path, absent):
    """As of masked data of which no target is scored."""
    lines = [{"step": n, "tokens": 10 * n, "loss": 3.0, "grad_norm": 1.0} for n in (1, 2, 3)]
    lines.append({"step": 3, "tokens": 30, "validation_loss": 3.0})
    lines = [line | {absent: "NaN"} if absent in line else line for line in lines]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encode, lines)))
    assert is_png(draw(tmp_path))
    [run] = read_runs([tmp_path])
    found = {chart["title"]: [line["name"] for line in chart["lines"]] for chart in charts([run])}
    assert ("validation" in found["loss"]) == (absent == "loss") and facts(run)


def test_a_run_without_any_finite_figure_can_be_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(encode({"step": 1, "tokens": 10, "loss": math.nan}))
    assert is_png(draw(tmp_path)) and charts(read_runs([tmp_path])) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [0.0, -2.0])
def test_losses_without_a_logarithm_are_drawn_on_a_plain_axis(tmp_path, loss):
    lines = [{"step": n, "tokens": 10 * n, "loss": loss, "grad_norm": 0.0} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encode, lines)))
    assert is_png(draw(tmp_path))
    assert not any(chart["ylog"] for chart in charts(read_runs([tmp_path])))


def test_a_run_without_steps_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(encode({"event": "start", "step": 0, "tokens": 0}))
    with pytest.raises(UsageError, match="no training step is recorded yet"):
        draw(tmp_path)


def test_a_folder_named_twice_is_refused(tmp_path):
    folder = make_run(tmp_path / "run")
    with pytest.raises(UsageError, match="a run folder is named twice"):
        read_runs([folder, tmp_path / "run" / ".." / "run"])


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]


def test_figures_of_a_run(tmp_path):
    run = read_run(make_run(tmp_path / "run", restart=True))
    assert len(run.steps) == 60 and run.restarts[0]["lost_steps"] == 10
    assert np.nansum(run.step_s) == pytest.approx(30.0)
    assert run.parameters == (125_226_240, 125_226_240 - (50_257 + 2048) * 768)
    compute = run.pf_days(run.tokens)
    assert compute is not None
    assert compute[-1] == pytest.approx(6 * 85_056_000 * 60_000 / 8.64e19)
    # The table tells what GPT-3's Table D.1 would, as `plan` does.
    told = dict(facts(run))["compute (6 a parameter and token)"]
    assert told == f"{6 * 125_226_240 * 60_000 / 8.64e19:.3g} PF-days"
    at, loss = run.validation
    assert at.tolist() == [20_000, 40_000, 60_000] and loss[0] == 9.0 / 20**0.3


def test_smooth_by_hand():
    values = np.array([1.0, 3.0, math.nan, 5.0])
    # Weights 1, 1/2, 1/4, 1/8 by distance, on both sides; the NaN has none.
    means = [
        (1 + 3 / 2 + 5 / 8) / (1 + 1 / 2 + 1 / 8),
        (1 / 2 + 3 + 5 / 4) / (1 / 2 + 1 + 1 / 4),
        (1 / 4 + 3 / 2 + 5 / 2) / (1 / 4 + 1 / 2 + 1 / 2),
        (1 / 8 + 3 / 4 + 5) / (1 / 8 + 1 / 4 + 1),
    ]
    # The first is the value itself, the second half of it, the last an eighth.
    expected = [1.0, (means[1] + 3) / 2, means[2], means[3] + (5 - means[3]) / 8]
    assert smooth(values, 2) == pytest.approx(expected)
    assert smooth(np.array([math.nan]), 5).tolist() == pytest.approx([math.nan], nan_ok=True)
    assert smooth(np.array([2.0, 4.0]), 1).tolist() == [2.0, 4.0]
    # A straight line stays where it is, away from its ends: no lag.
    line = np.arange(200.0)
    assert smooth(line, 8)[80:120] == pytest.approx(line[80:120], abs=0.01)


def test_thin_keeps_the_ends():
    x, y = thin(np.arange(10_001.0), np.arange(10_001.0) * 2, points=100)
    assert x[0] == 0 and x[-1] == 10_000 and len(x) <= 102
    assert (y == 2 * x).all()


def test_spikes_are_what_the_run_recorded_and_losses_that_are_no_number(tmp_path):
    def step(number: int, loss: float) -> dict:
        return {"step": number, "tokens": 10 * number, "loss": loss}

    spike = {"event": "spike", "reason": "loss 9 is 12 robust deviations above", "update": "made"}
    lines = [
        step(1, 3.0),
        step(2, 9.0),
        {**spike, "step": 2, "tokens": 20},
        step(3, math.nan),
        step(4, math.nan),
        step(5, 3.0),
        step(6, math.inf),
        # The same step again, after a restart: its spike is told again.
        {**spike, "step": 2, "tokens": 20},
    ]
    spikes = read_facts(tmp_path, lines).spikes
    found = [(one["step"], one["tokens"], one["reason"]) for one in spikes]
    assert found == [(2, 20, spike["reason"]), (3, 30, "loss nan"), (6, 60, "loss inf")]


def test_a_rollback_is_told_from_a_restart(tmp_path):
    place = {"step": 1, "tokens": 10, "time": 1.0}
    events = ["start", "resume", "rollback", "resume", "checkpoint"]
    lines = [{**place, "loss": 3.0}, *({**place, "event": kind} for kind in events)]
    run = read_facts(tmp_path, lines)
    assert [event["cause"] for event in run.restarts] == ["rollback", "restart"]
    assert {mark["kind"] for mark in charts([run])[0]["marks"]} == {"rollback", "restart"}
    told = dict(facts(run))
    assert told["restarts"] == "1" and told["rollbacks"] == "1"


def test_rates_are_printed_as_in_papers():
    assert [scientific(x) for x in (0, 6e-4, 2.5e-4, 1e-3)] == ["0", "6e-4", "2.5e-4", "1e-3"]


def test_the_command_writes_the_files(tmp_path, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    args = parse(a, b, "--output", tmp_path / "out")
    args.run(args)
    assert is_png(tmp_path / "out" / "report.png")
    assert str(tmp_path / "out" / "report.png") in capsys.readouterr().out

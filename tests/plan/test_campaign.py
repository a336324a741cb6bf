"""Runs with failures, files of a plan, and constants learnt from runs."""

import dataclasses
import datetime
import json
import math
import re
import subprocess

import numpy as np
import pytest

from megagpt.cli import main
from megagpt.config import dump_run, load_run
from megagpt.config.flops import parameters
from megagpt.errors import UsageError
from megagpt.plan.calibrate import calibrate
from megagpt.plan.candidates import Cluster, candidate
from megagpt.plan.constants import CONSTANTS, constants_for
from megagpt.plan.failures import Storm, outlooks
from megagpt.plan.judge import judge
from megagpt.plan.simulate import NeverEnds, Weather, best_interval, simulate, spread_of

DAY = 86_400.0


@pytest.fixture(autouse=True)
def no_profile_of_this_user(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAGPT_PROFILES", str(tmp_path / "profiles"))


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "gpt3-1.3b"\noutput = "x"\n[data]\ntrain = [{ path = "x" }]\n')
    return path


def test_without_failures_only_saving_and_the_start_cost():
    calm = Weather(failure_every=1e15, save=60, restart=600, queue=0)
    run = simulate(10 * DAY, 3600, calm)
    assert np.all(run.days == run.days[0])
    assert run.days[0] == pytest.approx(10 * (1 + 60 / 3600) + 600 / DAY)


def test_failures_cost_what_the_formula_says():
    # Each failure loses half an interval and a restart, to first order (Young 1974).
    storm = Weather(failure_every=20_000, save=30, restart=300, queue=200)
    run = simulate(20 * DAY, 1000, storm)
    expected = (1 + 30 / 1000) * (1 + (500 + 300 + 200) / 20_000)
    assert float(np.mean(run.days)) == pytest.approx(20 * expected, rel=0.02)
    low, mid, high = run.middle(run.goodput)
    assert low < mid < high < 1
    assert run.middle(run.days)[1] == pytest.approx(20 / mid, rel=1e-6)


def test_the_best_interval_is_best():
    storm = Weather(failure_every=20_000, save=30, restart=300, queue=0)
    best = best_interval(storm)
    assert best == pytest.approx((2 * 30 * 20_000) ** 0.5 - 30)
    at = {k: np.mean(simulate(20 * DAY, k * best, storm).days) for k in (0.25, 1, 4)}
    assert at[1] < at[0.25] and at[1] < at[4]


def test_a_notice_saves_what_was_done():
    storm = Weather(failure_every=20_000, save=30, restart=300, queue=0)
    spot = Weather(failure_every=1e12, notice_every=20_000, save=30, restart=300, queue=0)
    both = Weather(failure_every=40_000, notice_every=40_000, save=30, restart=300, queue=0)
    slow, fast, mixed = (np.mean(simulate(20 * DAY, 10_000, w).days) for w in (storm, spot, both))
    # An end costs the save, the start and, without notice, what was done since the last one.
    assert fast == pytest.approx(20 * (1 + 30 / 10_000) * (1 + 330 / 20_000), rel=0.005)
    assert mixed == pytest.approx((slow + fast) / 2, rel=0.02) and fast < 0.8 * slow
    assert best_interval(both) == best_interval(dataclasses.replace(both, notice_every=1.0))


def test_a_save_waits_for_the_one_before(run_file):
    # 13B on one node: 312 s to write, 4 s to copy, a step of 20 s or so.
    config = load_run(run_file, ["model=gpt3-13b", "parallel.ds_config=zero3_offload"])
    found = {}
    for every in (1, 10**6, 10**9):
        kept = dataclasses.replace(config.checkpoint, every_tokens=every)
        one = judge(
            candidate(dataclasses.replace(config, checkpoint=kept), 8), Cluster(gpu="h100", gpus=8)
        )
        storm = Storm(failures=1e9, notices=math.inf, restart_s=0.0, queue_s=0.0)
        found[every] = outlooks(one, storm, datetime.date(2026, 1, 1))[0]
    size = 12 * parameters(config.model)
    write, copy = size / 0.5e9, size / (8 * 5e9)
    # A step is saved whole, and the next save begins when the last is on the disk.
    assert found[1].interval_s == found[10**6].interval_s == one.step < write
    middle, spread = found[1].goodput[1], 0.002
    assert middle == pytest.approx(one.step / (write + copy), abs=spread)
    assert found[10**9].goodput[1] > 0.99


def test_failures_that_leave_no_time_end_with_a_message(run_file, capsys):
    often = Weather(failure_every=60, save=30, restart=300, queue=0)
    rule = "more than 99% of the time is lost, it never ends; save more often"
    why = rf"a failure every 1 min and a checkpoint every 60 min .*: {rule}"
    with pytest.raises(NeverEnds, match=why):
        simulate(10 * DAY, 3600, often)
    spot = Weather(failure_every=1e9, notice_every=10, save=300, restart=0, queue=0)
    with pytest.raises(NeverEnds, match="it never ends; .* or --gpu-hours-per-notice with"):
        simulate(10 * DAY, 3600, spot)
    many = Weather(failure_every=20, save=0.01, restart=0, queue=0)
    with pytest.raises(NeverEnds, match="failures are more than the 20,000 simulated"):
        simulate(10 * DAY, 20, many)
    words = ["plan", str(run_file), "--gpus", "16", "--simulate", "--gpu-hours-per-failure"]
    # The run file saves every 22 minutes; at the best interval the run goes on.
    assert main([*words, "0.5"]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "as the run file saves, every 2" in first and "it never ends" in first
    assert "at best, every 1 min: goodput 1" in second
    assert main([*words, "0.001"]) == 2
    assert main([*words, "1e9", "--spot", "1", "--gpu-hours-per-notice", "0.001"]) == 2
    assert "megagpt: --simulate: a failure every 0.00375 min" in capsys.readouterr().err


def test_step_times_vary_within_their_interval():
    drawn = spread_of((0.8, 1.3))
    assert np.quantile(drawn, (0.1, 0.5, 0.9)) == pytest.approx([0.8, 1.0, 1.3], rel=0.002)
    assert drawn[0] != spread_of((0.8, 1.3), seed=2)[0]


def test_the_command_simulates_and_writes(run_file, tmp_path, capsys):
    folder = tmp_path / "plan"
    words = ["plan", str(run_file), "parallel.ds_config=zero2", "--gpus", "16", "--simulate"]
    assert main([*words, "--write", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "; started today it ends on 20" in out
    assert "with failures, as the run file saves, every" in out and ", at best, every" in out
    made = load_run(folder / "run.toml")
    assert made.parallel.ds_config == str(folder / "ds_config.json")
    assert made.schedule == load_run(run_file).schedule
    assert json.loads((folder / "ds_config.json").read_text())["zero_optimization"]["stage"] == 2
    job = (folder / "job.sbatch").read_text()
    assert "--nodes=2\n" in job and "--gpus-per-node=8\n" in job
    subprocess.run(["bash", "-n", str(folder / "job.sbatch")], check=True)
    # What was written is planned like what it was written from.
    assert main(["plan", str(folder / "run.toml"), "--gpus", "16"]) == 0
    days = json.loads((folder / "plan.json").read_text())["days"]
    time = f"{days:,.3g} days" if days >= 2 else f"{days * 24:,.3g} hours"
    assert f"whole run: {time}" in capsys.readouterr().out
    # A run of seconds is told in seconds.
    short = ["schedule.total_tokens=1e6", "schedule.ramp_start_tokens=524288"]
    assert main(["plan", str(run_file), *short, "--gpus", "16"]) == 0
    assert re.search(r"whole run: [\d.]+ seconds \(80%: [\d.]+ to ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "16", "--gpus-per-node", "6", "--write", "DIR"], "16 GPUs are no whole nodes"),
        (["--gpus", "8", "--write", "FILE"], "cannot be written: "),
        (["--gpus", "8", "--simulate", "--gpu-hours-per-failure", "0"], "must be above 0"),
        (
            ["--gpus", "8", "--simulate", "--spot", "1", "--gpu-hours-per-notice", "0"],
            "must be above 0",
        ),
        (
            ["--gpus", "8", "--simulate", "--gpu-hours-per-notice", "2000"],
            "--gpu-hours-per-notice counts with --spot PRICE alone; add it",
        ),
        (["--gpus", "8", "--spot", "1"], "--spot counts with --simulate alone; add it"),
        (["--gpus", "8", "--simulate", "--spot", "-1"], "--queue-minutes and --spot 0 or more"),
        (["--gpus", "8", "--picture", "run.toml/x.png"], "/x.png: cannot be written: "),
        (["--gpus", "8", "--picture", "DIR.doc"], "DIR.doc: cannot be written: Format 'doc'"),
        (["--calibrate", "x"], "--calibrate RUN_DIR... takes no run file"),
    ],
)
def test_what_cannot_be_simulated_or_written(run_file, tmp_path, capsys, words, message):
    (tmp_path / "file").write_text("")
    places = {"DIR": str(tmp_path / "d"), "FILE": str(tmp_path / "file")}
    assert main(["plan", str(run_file), *(places.get(word, word) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_picture(run_file, tmp_path):
    path = tmp_path / "plan.png"
    assert main(["plan", str(run_file), "--gpus", "8", "--picture", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"


def recorded(tmp_path, size: str, gpus: int, constants: dict[str, float]):
    """A run folder as one that trained on a machine with these constants would be."""
    folder = tmp_path / f"{size}-{gpus}"
    folder.mkdir()
    source = tmp_path / f"{size}.toml"
    source.write_text(f'model = "gpt3-{size}"\noutput = "x"\n[data]\ntrain = [{{ path = "x" }}]\n')
    config = load_run(source)
    one = judge(candidate(config, gpus), Cluster(gpu="h100", gpus=gpus), constants)
    (folder / "config.toml").write_text(dump_run(config))
    (folder / "run.json").write_text(json.dumps({"layout": f"{gpus} ranks = data {gpus}"}))
    pairs = list(zip(config.schedule.segments, one.seconds, strict=True))
    lines = [json.dumps({"event": "start"})]
    for segment, seconds in pairs:
        for n in range(6):
            step = seconds * (3 if n < 2 else 1)
            figures = {"step_s": step, "batch_tokens": segment.batch_tokens}
            lines.append(json.dumps(figures | {"memory_peak_bytes": one.peak}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"torn')
    return folder, config, one


def test_what_a_cluster_is_like_is_learnt_from_one_run_for_others(tmp_path, capsys):
    machine = CONSTANTS | {
        "framework.megagpt": 1.6, "launch.megagpt": 6e-4, "data_exposed.megagpt": 2.5,
        "overhead.megagpt": 5.0,
    }  # fmt: skip
    folders = [str(recorded(tmp_path, size, 8, machine)[0]) for size in ("125m", "760m")]
    assert constants_for("h100") == CONSTANTS
    assert main(["plan", "--calibrate", *folders]) == 0
    assert "plans for h100 use these constants from now on" in capsys.readouterr().out
    assert constants_for("a100") == CONSTANTS
    for size, gpus in (("350m", 8), ("1.3b", 4), ("125m", 2)):
        _, config, truth = recorded(tmp_path, size, gpus, machine)
        one = judge(candidate(config, gpus), Cluster(gpu="h100", gpus=gpus))
        before = judge(candidate(config, gpus), Cluster(gpu="h100", gpus=gpus), CONSTANTS)
        assert one.step == pytest.approx(truth.step, rel=0.1) and before.step < 0.8 * truth.step
        assert one.peak == pytest.approx(truth.peak, rel=0.05)


def test_parts_of_a_step_tell_what_the_step_alone_does_not(tmp_path):
    machine = CONSTANTS | {"framework.megagpt": 2.5, "step.megagpt": 0.3}
    cluster = Cluster(gpu="h100", gpus=1)
    folder, config, truth = recorded(tmp_path, "125m", 1, machine)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    full = [json.loads(line) for line in lines[-7:-1]]
    passes, last = truth.items["compute"], {"optimizer_s": truth.items["optimizer"]}
    parts = {"forward_s": passes / 3, "backward_s": passes * 2 / 3} | last
    found = []
    for more in ({}, parts):
        text = "\n".join(json.dumps(record | more) for record in full)
        (folder / "metrics.jsonl").write_text(text + "\n")
        calibrate([str(folder)], cluster)
        found.append(constants_for("h100")["step.megagpt"])
    assert found[1] == pytest.approx(0.3, rel=0.05) and abs(found[0] / 0.3 - 1) > 0.1
    assert judge(candidate(config, 1), cluster).step == pytest.approx(truth.step, rel=0.02)


def test_runs_that_nothing_can_be_learnt_from(tmp_path):
    cluster = Cluster(gpu="h100", gpus=1)
    folder, _, _ = recorded(tmp_path, "125m", 1, dict(CONSTANTS))
    (folder / "run.json").rename(folder / "elsewhere")
    with pytest.raises(UsageError, match=r"--calibrate .*: must be a run folder with config.toml"):
        calibrate([str(folder)], cluster)
    for text in ("[]", "5", "{}", "{"):
        (folder / "run.json").write_text(text)
        with pytest.raises(UsageError, match="must be a run folder with config.toml, run.json"):
            calibrate([str(folder)], cluster)
    (folder / "elsewhere").rename(folder / "run.json")
    (folder / "metrics.jsonl").write_text('{"step_s": 1.0, "batch_tokens": 2048}\n5\nnull\n[1]\n')
    with pytest.raises(UsageError, match="needs more than four recorded steps of one batch size"):
        calibrate([str(folder)], cluster)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "h100.json").write_text("[]")
    with pytest.raises(UsageError, match="not a profile that --calibrate wrote"):
        constants_for("h100")

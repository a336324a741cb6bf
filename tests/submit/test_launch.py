"""Jobs of SLURM made for a run: what the script says, what is refused, what SLURM is told."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.config import load_run
from megagpt.errors import UsageError
from megagpt.plan.disk import checkpoint_bytes
from megagpt.submit.command import recent, records_of, starts_needed
from megagpt.submit.job import LAUNCH, lead_s, seconds_of, sweep_of
from tests.lib.corpus import run_file
from tests.lib.distributed import ROOT, undisturbed

TEMPLATE = LAUNCH / "slurm.sbatch"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SIZE = ("--nodes", "1", "--gpus-per-node", "2", "--time", "1:00:00")


@pytest.fixture(autouse=True)
def in_the_root_without_slurm(monkeypatch):
    """A SLURM that happens to be installed here is not asked."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))


def launched(*arguments):
    """The script that the command wrote."""
    assert main(["launch", "slurm", *map(str, arguments)]) == 0
    outputs = [str(one).partition("=")[2] for one in arguments if str(one).startswith("output=")]
    return (
        Path(outputs[-1] if outputs else arguments[0].parent / "run") / "job.sbatch"
    ).read_text()


def options(text):
    """#SBATCH options of a script, as SLURM reads them: up to the first command."""
    head = text[: re.search(r"(?m)^[^#\n]", text).start()]
    return dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=?([^ \n]*)", head))


def checked_by_shellcheck(path):
    done = subprocess.run([SHELLCHECK, "-x", path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


# --- the script ---------------------------------------------------------------------------------


def test_a_job_for_a_run(tmp_path, capsys):
    path = run_file(tmp_path)
    more = ("--partition", "low", "--account", "us", "--qos", "long", "--cpus-per-task", "4")
    text = launched(path, *SIZE, *more, "--name", "my job", "schedule.peak_lr=1e-3")
    assert options(text) == options(TEMPLATE.read_text()) | {
        "job-name": '"my',
        "nodes": "1",
        "ntasks-per-node": "2",
        "gpus-per-node": "2",
        "cpus-per-task": "4",
        "time": "1:00:00",
        "signal": "B:USR1@180",
        "output": f"{tmp_path}/run/job.log",
        "partition": "low",
        "account": "us",
        "qos": "long",
    }
    assert text.startswith("#!/usr/bin/env bash\n# Written by `megagpt launch slurm`")
    assert '#SBATCH --job-name="my job"\n' in text
    assert f"\nset -- {path} schedule.peak_lr=1e-3\n" in text
    checked_by_shellcheck(tmp_path / "run" / "job.sbatch")
    told = capsys.readouterr().out
    assert "2 ranks = data 2, 1 x 2 GPUs, 1:00:00" in told
    assert "told to save and stop 180 s before its end" in told


def test_any_option_of_sbatch(tmp_path, capsys):
    path = run_file(tmp_path)
    more = ("--gres", "gpu:a100:2", "--constraint", "nvme", "--exclude", "n[1-2]", "--mem", "0")
    text = launched(path, *SIZE, *more, "--exclusive", "--sbatch", "comment=my run", "--sbatch=x")
    found = options(text)
    assert "gpus-per-node" not in found
    assert (found["gres"], found["constraint"], found["mem"]) == ("gpu:a100:2", "nvme", "0")
    assert '#SBATCH --exclude="n[1-2]"\n' in text and "#SBATCH --exclusive\n" in text
    assert '#SBATCH --comment="my run"\n' in text and "#SBATCH --x\n" in text
    assert "gpus-per-node" not in options(launched(path, *SIZE, "--no-gres"))
    assert main(["launch", "slurm", str(path), *SIZE, "--sbatch", "-n 3"]) == 2
    assert "--sbatch -n 3: must be a long option of sbatch" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["nodes=4", "ntasks-per-node=3", "time=5", "array=0-3"])
def test_what_the_run_was_checked_for_stays(tmp_path, capsys, option):
    words = ["launch", "slurm", str(run_file(tmp_path)), *SIZE, "--sbatch", option]
    assert main(words) == 2
    assert f"--sbatch {option}: must be a long option of sbatch" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_spare_hosts_are_asked_for_beside_those_that_train(tmp_path, capsys):
    text = launched(run_file(tmp_path), *SIZE, "--spare", "2")
    assert options(text)["nodes"] == "3" and "#SBATCH --no-kill\n" in text
    assert "\nexport SPARE=2\n" in text
    assert "1 x 2 GPUs" in capsys.readouterr().out
    checked_by_shellcheck(tmp_path / "run" / "job.sbatch")


def test_all_that_a_job_does_stands_in_the_template(tmp_path):
    text = launched(run_file(tmp_path), *SIZE)
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert commands == [
        f"set -- {tmp_path}/run.toml",
        "trap 'asked=1' USR1 USR2 XCPU",
        f"export PYTHON=${{PYTHON:-{sys.executable}}} MEGAGPT_LAUNCH={ROOT}/launch",
        '. "$MEGAGPT_LAUNCH/slurm.sbatch"',
    ]
    # Every option of the template, such as --requeue and --open-mode=append.
    there = options(TEMPLATE.read_text())
    assert options(text).keys() == there.keys()
    assert all(options(text)[name] == there[name] for name in ("requeue", "open-mode"))


def test_words_with_blanks_and_quotes_arrive_whole(tmp_path):
    path = run_file(tmp_path)
    word = f"""data.train=[{{ path = "{tmp_path}/train", weight = 1.0 }}]"""
    launched(path, word, *SIZE)
    script_path = tmp_path / "run" / "job.sbatch"
    (line,) = re.findall(r"(?m)^set -- .*$", script_path.read_text())
    shell = subprocess.run(
        ["/bin/bash", "-c", line + '\nprintf "%s\\n" "$@"'], capture_output=True, text=True
    )
    assert shell.stdout.splitlines() == [str(path), word]
    checked_by_shellcheck(script_path)


def test_a_layout_that_is_slow_is_told(tmp_path, capsys):
    path = run_file(tmp_path)
    split = ("parallel.tensor=2", "parallel.ds_config=pipeline")
    launched(path, *split, *SIZE)
    assert "slow: " not in capsys.readouterr().out
    launched(path, *split, "--nodes", "2", "--gpus-per-node", "1", "--time", "60")
    assert "slow: parallel.tensor = 2 does not divide the 1 ranks of a host" in (
        capsys.readouterr().out
    )


def test_the_175b_run(tmp_path):
    text = launched(
        "launch/runs/gpt3-175b.toml",
        *("--nodes", "128", "--gpus-per-node", "8", "--time", "2-0"),
        f"output={tmp_path}/175b",
    )
    assert options(text)["nodes"] == "128" and options(text)["time"] == "2-0"


def test_a_sweep_is_an_array_of_runs_with_folders_of_their_own(tmp_path, capsys):
    path = run_file(tmp_path)
    sweeps = ("--sweep", "schedule.peak_lr=1e-3,2e-3", "--sweep", "seed=1,2,3")
    text = launched(path, *SIZE, *sweeps)
    assert options(text)["array"] == "0-5"
    assert options(text)["output"] == f"{tmp_path}/run/job-%a.log"
    checked_by_shellcheck(tmp_path / "run" / "job.sbatch")
    # What a task trains, said by the shell itself.
    begin, end = text.index("case $SLURM"), text.index("esac") + 4
    words = {}
    for task in range(6):
        shell = subprocess.run(
            ["/bin/bash", "-c", text[begin:end] + '\nprintf "%s\\n" "$@"'],
            env={"SLURM_ARRAY_TASK_ID": str(task)},
            capture_output=True,
            text=True,
        )
        words[task] = shell.stdout.splitlines()
    assert words[4] == [
        str(path),
        "schedule.peak_lr=2e-3",
        "seed=2",
        f"output={tmp_path}/run/peak_lr-2e-3_seed-2",
    ]
    configs = [load_run(file, overrides) for file, *overrides in words.values()]
    assert len({config.output for config in configs}) == 6
    assert {(c.schedule.peak_lr, c.seed) for c in configs} == {
        (lr, seed) for lr in (1e-3, 2e-3) for seed in (1, 2, 3)
    }
    assert "task 5: schedule.peak_lr=2e-3 seed=3 output=" in capsys.readouterr().out


def test_a_value_that_is_a_list_is_one_value():
    points = sweep_of(['model.attention=["dense"],["dense", "banded"]'], "runs/x")
    assert [point[0] for point in points] == [
        'model.attention=["dense"]',
        'model.attention=["dense", "banded"]',
    ]
    assert len({point[1] for point in points}) == 2
    assert all(re.fullmatch(r"output=runs/x/[\w.+-]+", point[1]) for point in points)


# --- times --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:05", 5405),
        ("2-0", 172800),
        ("1-6", 108000),
        ("1-6:30", 109800),
        ("1-06:30:05", 109805),
    ],
)
def test_times_as_slurm_reads_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "1h", "1:2:3:4", "-5", "UNLIMITED", "9" * 5000])
def test_times_that_are_none(text):
    with pytest.raises(UsageError, match=r"--time .*must be a time limit as SLURM reads it"):
        seconds_of(text)


def test_a_large_model_is_told_earlier(tmp_path):
    small = load_run(run_file(tmp_path))
    large = load_run("launch/runs/gpt3-175b.toml")
    assert lead_s(small, 16, "1-0") == 180
    # 12 bytes for each of 175 billion parameters, by 16 hosts of 0.5 GB/s, twice.
    save = checkpoint_bytes(large.model) / 16 / 0.5e9
    assert 2 * (save + 60) <= lead_s(large, 16, "1-0") < 2 * (save + 60) + 60
    assert lead_s(large, 16, "1-0", step_s=600) - lead_s(large, 16, "1-0") in (1080, 1020, 1140)
    with pytest.raises(UsageError, match=r"told \d+ s before its end .* more than half of it"):
        lead_s(large, 1, "60")


def test_a_measured_save_counts_instead_of_a_guess(tmp_path, capsys):
    path = run_file(tmp_path)
    shutil.copytree(undisturbed() / "run", tmp_path / "run")
    saves = recorded_saves(tmp_path / "run")
    assert saves and all(save["save_s"] >= save["stall_s"] / 2 > 0 for save in saves)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        for save_s in (9000.0, 400.0, 500.0, 300.0, 300.0, 300.0):
            file.write(json.dumps(saves[-1] | {"save_s": save_s}) + "\n")
    longer = f"schedule.total_tokens={300 * 512}"
    assert main(["launch", "slurm", str(path), longer, *SIZE]) == 0
    # Twice 500 s and two short steps, in whole minutes.
    assert "told to save and stop 1020 s before its end" in capsys.readouterr().out


def recorded_saves(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event") == "checkpoint"]


def test_starts_that_a_run_needs():
    config = load_run(undisturbed() / "run.toml")
    there = dataclasses.replace(config, output=str(undisturbed() / "run"))
    assert starts_needed(config, recent(records_of(there), "loss", 9), 3600) == 0
    half = [{"tokens": config.schedule.end_tokens // 2, "tokens_per_s": 2.0}]
    left = config.schedule.end_tokens - half[0]["tokens"]
    assert starts_needed(config, half, 100) == -(-left // 200)
    nowhere = dataclasses.replace(config, output=str(undisturbed() / "none"))
    assert records_of(nowhere) == [] and starts_needed(config, [], 1) == 0


def test_a_chain_as_long_as_the_run_needs(tmp_path, capsys):
    path = run_file(tmp_path)
    shutil.copytree(undisturbed() / "run", tmp_path / "run")
    assert main(["launch", "slurm", str(path), *SIZE, "--chain"]) == 2
    assert f"--chain: the run in {tmp_path}/run is complete" in capsys.readouterr().err
    # The same run at a thousandth of its speed, ten times as long.
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    slow = [
        line | {"tokens_per_s": 0.5, "step_s": 10.0} if "loss" in line else line for line in lines
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in slow))
    longer = f"schedule.total_tokens={300 * 512}"
    assert main(["launch", "slurm", str(path), longer, *SIZE, "--chain"]) == 0
    told = capsys.readouterr().out
    left = load_run(path, [longer]).schedule.end_tokens - 30 * 512
    starts = -(-left // (0.5 * (3600 - 120)))
    assert f"at the speed of the run's latest steps: {starts:.0f} starts of that time" in told
    assert "told to save and stop 120 s before its end" in told
    assert f"say --submit, which queues {starts:.0f} jobs" in told


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "0"), "--nodes 0: must be 1 or more"),
        (("--gpus-per-node", "3"), "must be a multiple of the 3 data ranks"),
        (("parallel.pipeline=3",), "2 ranks: must be a positive multiple of pipeline x tensor"),
        (
            ("--sweep", "parallel.tensor=1,4"),
            "2 ranks: must be a positive multiple of pipeline x tensor",
        ),
        (("--sweep", "schedule.peek_lr=1"), "unknown key 'schedule.peek_lr'"),
        (("--sweep", "seed"), "--sweep seed: must be section.key=value,value,..."),
        (("--sweep", "output=a,b"), "of a key other than output"),
        (("--sweep", "seed=1,2", "--chain", "3"), "--chain with --sweep"),
        (("--chain",), "/run has no measured speed yet; say --chain N"),
        (("--time", "3"), "told 180 s before its end to save in time, which is more than half"),
        (("--submit",), "sbatch is not there: --submit needs a host where SLURM's commands are"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, arguments, message):
    path = run_file(tmp_path)
    assert main(["launch", "slurm", str(path), *SIZE, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "job.sbatch").exists() == (arguments == ("--submit",))


def test_elsewhere_than_in_the_root_of_the_repository(tmp_path, monkeypatch):
    path = run_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = launched(path, *SIZE)
    # What the job runs is there, whatever the folder that it is submitted from.
    (folder,) = re.findall(r"MEGAGPT_LAUNCH=(\S+)", text)
    assert (Path(folder) / "slurm.sbatch").is_file() and (Path(folder) / "env.sh").is_file()


def test_an_option_that_is_none_is_no_override(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["launch", "slurm", str(run_file(tmp_path)), *SIZE, "--hosts", "seed=1"])
    assert end.value.code == 2
    assert "unrecognized arguments: --hosts" in capsys.readouterr().err


def test_a_job_of_a_chain_is_not_queued_again(tmp_path, capsys):
    text = launched(run_file(tmp_path), *SIZE, "--chain", "3")
    assert "requeue" not in options(text) and options(text)["no-requeue"] == ""
    assert "which queues 3 jobs" in capsys.readouterr().out

"""What `megagpt launch slurm` writes and submits, under a real SLURM."""

import re
from pathlib import Path

import pytest

from tests.lib.corpus import run_file
from tests.lib.distributed import steps
from tests.virtual.hosts import MEGAGPT, Cluster
from tests.virtual.slurm import Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

SIZE = ("--nodes", "1", "--gpus-per-node", "2", "--cpus-per-task", "1", "--time", "20:00")


def launched(cluster: Cluster, file: Path, *words: str) -> tuple[int, str]:
    """Exit code of the command on the login host, and what it said."""
    return cluster["login"].run(*MEGAGPT, "launch", "slurm", str(file), *SIZE, *words)


def test_a_chain_ends_with_the_job_that_finishes_the_run(cluster, slurm, tmp_path):
    file = run_file(tmp_path, schedule={"total_tokens": 8192})
    code, said = launched(cluster, file, "--chain", "3", "--submit")
    assert code == 0, said
    first, *others = map(int, re.search(r"submitted: (\d+) (\d+) (\d+)\n", said).groups())
    for i, number in enumerate(others):
        found = slurm.job(number)["Dependency"]
        assert re.findall(r"afternotok:(\d+)", found) == [str(n) for n in (first, *others[:i])]
    assert slurm.end(first)["JobState"] == "COMPLETED", (tmp_path / "run/job.log").read_text()
    assert [slurm.end(number)["JobState"] for number in others] == ["CANCELLED", "CANCELLED"]
    assert steps(tmp_path / "run")[-1]["tokens"] == 8192


@pytest.mark.parametrize("submit", [(), ("--submit",)])
def test_what_slurm_says_against_a_job(cluster, slurm, tmp_path, submit):
    code, said = launched(cluster, run_file(tmp_path), "--partition", "nonesuch", *submit)
    assert code == 2
    assert re.search(r"SLURM refuses .*job.sbatch: .*invalid partition specified: nonesuch", said)


def told(slurm: Slurm, number: int) -> dict[str, str]:
    """What SLURM took from the options of a job of another system."""
    keys = ("JobName", "NumTasks", "TimeLimit", "Partition", "StdOut")
    return {key: slurm.job(number)[key] for key in keys}


@pytest.mark.parametrize("system", ["pbs", "lsf"])
def test_sbatch_reads_jobs_of_other_systems(cluster, slurm, tmp_path, system):
    """sbatch takes #PBS, and of #BSUB these options; the job of PBS trains, its ranks by srun."""
    file = run_file(tmp_path, schedule={"total_tokens": 4096})
    size = ("--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1", "--time", "20:00")
    more = ("--name", "mine", "--queue", "low")
    code, said = cluster["login"].run(*MEGAGPT, "launch", system, str(file), *size, *more)
    assert code == 0, said
    path, options = tmp_path / f"run/job.{system}", ["--export=ALL,LAUNCH=srun"]
    if system == "lsf":
        unknown = re.compile(r"#BSUB -(?![JnWoq] ).*\n")
        assert len(unknown.findall(path.read_text())) == 6
        path.write_text(unknown.sub("", path.read_text()))
        options += ["--nodes=2"]
    number = slurm.submit(*options, path)
    log = tmp_path / "run/job.log"
    assert slurm.end(number)["JobState"] == "COMPLETED", log.read_text()
    assert told(slurm, number) == {
        "JobName": "mine",
        "NumTasks": "2",
        "TimeLimit": "00:20:00",
        "Partition": "low",
        "StdOut": str(log),
    }
    assert slurm.job(number)["NumNodes"] == "2"
    assert steps(tmp_path / "run")[-1]["tokens"] >= 4096

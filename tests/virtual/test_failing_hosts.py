"""Hosts that fail again and again are left out of the next start, and the run ends all the same."""

import os
import signal
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints
from megagpt.checkpoint.record import step_of
from tests.lib.corpus import run_file
from tests.virtual.hosts import wait_until
from tests.virtual.test_faults import another
from tests.virtual.test_slurm import is_the_calm_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

TWO_OF_THREE = ("-N2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


def failures(run: Path) -> list[str]:
    """The hosts of RUN/failed_hosts.txt, a line each."""
    path = run / "failed_hosts.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def saved_anew(run: Path, before: int) -> int:
    """The step of a newer checkpoint than that of step `before`, once there is one."""

    def newest() -> int:
        return max((step_of(folder) or 0 for folder in list_checkpoints(run)), default=0)

    wait_until(lambda: newest() > before, "a checkpoint", 120)
    return newest()


def blamed(run: Path, hosts: list[str]) -> None:
    """Returns once these hosts have failed."""
    wait_until(lambda: failures(run) == hosts, f"{hosts} are blamed", 60)


def test_a_host_that_loses_its_rank_twice_is_left_out(cluster, slurm, spare, file, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    number = slurm.submit(*TWO_OF_THREE, f"--output={log}", "launch/slurm.sbatch", file)
    # The job's script runs on host-a.
    failed, there = "host-b", 0
    for times in (1, 2):
        there = saved_anew(run, there)
        (rank,) = cluster[failed].ranks()
        os.kill(rank, signal.SIGKILL)
        blamed(run, times * [failed])
    ended = slurm.end(number, 240)
    assert ended["JobState"] == "COMPLETED", log.read_text()
    assert (ended["ExcNodeList"], ended["NodeList"]) == (failed, "host-a,host-c"), ended
    assert f"left out: {failed}" in log.read_text()
    assert failures(run) == [failed, failed]
    is_the_calm_run(run)


def test_a_host_that_the_doctor_finds_wanting_is_left_out(cluster, slurm, spare, tmp_path):
    file = run_file(tmp_path, schedule={"total_tokens": 4096})
    shard, log = sorted((tmp_path / "train").glob("*.bin"))[-1], tmp_path / "log"
    options = (*TWO_OF_THREE, "--export=ALL,DOCTOR=1", f"--output={log}")
    with another(cluster["host-b"], tmp_path / "train", tmp_path / "copy") as copy:
        (copy / shard.name).unlink()
        ended = slurm.end(slurm.submit(*options, "launch/slurm.sbatch", file), 240)
    said = log.read_text()
    assert ended["JobState"] == "COMPLETED", said
    assert (ended["ExcNodeList"], ended["NodeList"]) == ("host-b", "host-a,host-c"), ended
    assert "host-b: failed the doctor's examination" in said and "left out: host-b" in said
    assert said.count(" clocks ") == 2, said


def test_too_few_hosts_are_left_for_leaving_one_out(cluster, slurm, tmp_path):
    file, log = run_file(tmp_path, schedule={"total_tokens": 4096}), tmp_path / "log"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failed_hosts.txt").write_text(2 * "host-b 2026-01-01 00:00:00 lost\n")
    options = (*TWO_OF_THREE, f"--output={log}")
    ended = slurm.end(slurm.submit(*options, "launch/slurm.sbatch", file), 120)
    assert ended["JobState"] == "COMPLETED", log.read_text()
    assert ended["NodeList"] == "host-a,host-b"
    assert "too few hosts without those that failed: host-b" in log.read_text()


def test_a_job_with_a_spare_host_starts_again_by_itself(cluster, slurm, spare, file, tmp_path):
    """The second failure is a host without power; the job keeps its other two, and its place."""
    run, log = tmp_path / "run", tmp_path / "log"
    options = ("-N3", "--no-kill", *TWO_OF_THREE[1:], "--export=ALL,SPARE=1")
    number = slurm.submit(*options, f"--output={log}", "launch/slurm.sbatch", file)
    there = saved_anew(run, 0)
    assert slurm.job(number)["NodeList"] == "host-a,host-b,host-c"
    assert not cluster["host-c"].ranks()
    (rank,) = cluster["host-b"].ranks()
    os.kill(rank, signal.SIGKILL)
    blamed(run, ["host-b"])
    there = saved_anew(run, there)
    cluster["host-b"].lose_power()
    blamed(run, ["host-b", "host-b"])
    wait_until(cluster["host-c"].ranks, "the spare host trains")
    ended = slurm.end(number, 240)
    cluster["host-b"].switch_on()
    slurm.start_node(cluster["host-b"])
    said = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), said
    assert "host-b: lost, says SLURM" in said and "start 3 ended with code 0" in said
    is_the_calm_run(run)

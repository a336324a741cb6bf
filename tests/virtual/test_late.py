"""What comes too late: a host that is cut off, a save beyond the end, a launcher, a second run."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints, verify
from tests.lib.corpus import run_file
from tests.lib.distributed import steps, wait_for_step
from tests.virtual.hosts import Cluster, wait_until
from tests.virtual.test_faults import ENDLESS, start
from tests.virtual.test_slurm import Job, is_the_calm_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def test_a_host_that_is_cut_off_keeps_the_run_until_it_ends_by_itself(cluster, slurm, spare, file):
    rare = ("checkpoint.every_tokens=10240", "evaluate.every_tokens=0")
    # The next start must come while the host still trains: later on a machine that is busy.
    busy_s = sum(step["step_s"] for step in steps(file.parent / "calm"))
    minutes = 1.25 + busy_s / 15
    job = Job(cluster, slurm, file, f"log.watchdog_minutes={minutes:.2f}", *rare)
    job.trains_on()
    # Rank 0, which holds the lock, and the job's script are on this host.
    cut = cluster["host-a"]
    (holder,) = cut.ranks()
    with cut.unplugged():
        wait_until(lambda: job.starts == 1, "SLURM misses the host")
        wait_until(lambda: "waiting for process" in job.log.read_text(), "the next start waits")
        assert "on host-a, which still trains there" in job.log.read_text()
        assert cut.ranks() == [holder] and "resuming at step" not in job.log.read_text()
        limit_s = 60 * minutes + 240
        wait_until(lambda: "resuming at step" in job.log.read_text(), "it goes on", limit_s)
        assert not cut.ranks()
    assert slurm.end(job.number, 240)["JobState"] == "COMPLETED", job.said("not completed")
    wait_until(lambda: slurm.state(cut) == "idle", "the host is back")
    is_the_calm_run(job.run)


def test_a_save_that_is_not_over_at_the_end_of_the_time(cluster, slurm, file):
    job = Job(cluster, slurm, file)
    job.trains()
    slurm.login.check(f"scontrol update JobId={job.number} EndTime=now+90")
    ranks = [process for host in slurm.nodes for process in host.ranks()]
    for process in ranks:
        os.kill(process, signal.SIGSTOP)
    try:
        # SLURM would end the job for good at its time.
        wait_until(lambda: job.starts == 1, "the job is queued again")
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
    slurm.login.check(f"scontrol update JobId={job.number} TimeLimit=20")
    assert slurm.end(job.number, 240)["JobState"] == "COMPLETED", job.said("not completed")
    is_the_calm_run(job.run)


def test_a_launcher_that_dies_in_a_long_evaluation(cluster, tmp_path):
    file = run_file(tmp_path, schedule={"total_tokens": 8192})
    hosts = hostfile(tmp_path)
    long = ("evaluate.samples=8", "evaluate.sample_tokens=256")
    run = tmp_path / "run"
    script = start(cluster, "launch/multinode.sh", str(file), *ENDLESS, *long, HOSTFILE=str(hosts))
    # A run begins with an evaluation.
    wait_until(lambda: (run / "metrics.jsonl").exists(), "the evaluation has begun")
    (far,) = cluster["host-b"].ranks()
    os.kill(far, signal.SIGSTOP)
    for process in cluster["login"].processes("bin/deepspeed"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    # More than a step without its launcher is given; the other rank is in its evaluation.
    time.sleep(25)
    assert len(cluster["host-a"].ranks()) == 1
    os.kill(far, signal.SIGCONT)
    wait_until(lambda: not any(cluster[h].ranks() for h in ("host-a", "host-b")), "they end")
    script.communicate(timeout=60)
    (saved,) = list_checkpoints(run)
    assert verify(saved) == []


def test_two_runs_at_one_port(cluster: Cluster, tmp_path):
    hosts = hostfile(tmp_path)
    (tmp_path / "b").mkdir()
    first, second = run_file(tmp_path), run_file(tmp_path / "b")
    script = start(cluster, "launch/multinode.sh", str(first), *ENDLESS, HOSTFILE=str(hosts))
    wait_for_step(tmp_path / "run", 2, 240)
    there = [cluster[name].ranks() for name in ("host-a", "host-b")]
    code, said = cluster["login"].run(
        "launch/multinode.sh", str(second), environ={"HOSTFILE": str(hosts)}
    )
    assert code != 0 and "MASTER_PORT = 29500: " in said, said
    wait_until(
        lambda: [cluster[name].ranks() for name in ("host-a", "host-b")] == there,
        "the second run's ranks have ended, and the first run's go on",
    )
    (own,) = cluster["login"].processes("bash launch/multinode.sh")
    os.kill(own, signal.SIGTERM)
    script.communicate(timeout=120)
    assert not any(cluster[name].ranks() for name in ("host-a", "host-b"))


def hostfile(root: Path) -> Path:
    path = root / "hosts"
    path.write_text("host-a slots=1\nhost-b slots=1\n")
    return path

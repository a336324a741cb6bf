"""A job of SLURM goes on through all that ends it, to the weights of a run nothing disturbed."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints
from megagpt.checkpoint.record import step_of
from megagpt.cluster.slurm import expand_hosts
from tests.lib.distributed import digest_of_weights, exact, steps, wait_for_step
from tests.virtual.hosts import Cluster, wait_until
from tests.virtual.slurm import Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

TWO_HOSTS = ("-N2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


class Job:
    """A training of two ranks on two hosts, through launch/slurm.sbatch, and its run folder."""

    def __init__(
        self, cluster: Cluster, slurm: Slurm, file: Path, *arguments: str, minutes: int = 20
    ) -> None:
        self.cluster, self.slurm, self.run = cluster, slurm, file.parent / "run"
        self.log = file.parent / "log"
        # A minute is the least that SLURM's clock of time limits can tell apart.
        options = (*TWO_HOSTS, f"--time={minutes}", "--signal=B:USR1@60", f"--output={self.log}")
        self.number = slurm.submit(*options, "launch/slurm.sbatch", file, *arguments)

    @property
    def starts(self) -> int:
        """How often the job was started again."""
        return int(self.slurm.job(self.number)["Restarts"])

    def trains(self) -> None:
        """Returns when this start has saved a checkpoint of its own."""
        before = list_checkpoints(self.run)[-1:]
        wait_until(lambda: list_checkpoints(self.run)[-1:] != before, self.said("no checkpoint"))

    def trains_on(self) -> None:
        """Returns when it trains, and the next save is not due: that and its end have more time
        than a step."""
        self.trains()
        wait_for_step(self.run, (step_of(list_checkpoints(self.run)[-1]) or 0) + 2, 240)

    def said(self, what: str) -> str:
        """A message with the end of the job's log."""
        return f"{what}\n{self.log.read_text()[-3000:] if self.log.exists() else 'no log'}"

    def starts_again(self, times: int) -> None:
        wait_until(lambda: self.starts == times, f"job is queued for start {times + 1}")
        self.slurm.wait(self.number, "RUNNING", timeout_s=120)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the ranks until they were asked to stop, so that the run needs few steps."""
        ranks = [process for host in self.slurm.nodes for process in host.ranks()]
        assert len(ranks) == 2, self.said(f"ranks: {ranks}")
        for process in ranks:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
            wait_until(lambda: all(map(asked_to_stop, ranks)), "SIGUSR1 reaches all ranks")
        finally:
            for process in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)


def asked_to_stop(process: int) -> bool:
    """Whether SIGUSR1 waits for a process that is held, or has reached it."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    waiting = int(fields["ShdPnd"], 16) | int(fields["SigPnd"], 16)
    return bool(waiting >> (signal.SIGUSR1 - 1) & 1) or not fields["State"].startswith("T")


def is_the_calm_run(run: Path) -> None:
    calm = run.parent / "calm"
    assert exact(steps(run)) == exact(steps(calm))
    assert digest_of_weights(run) == digest_of_weights(calm)


def test_preempted_twice_out_of_time_a_dead_rank_and_a_lost_host(cluster, slurm, file):
    job = Job(cluster, slurm, file)
    for times in (1, 2):
        job.trains()
        with job.held():
            slurm.submit(
                "-p", "high", *TWO_HOSTS, "--exclusive", "--output=/dev/null", "--wrap=true"
            )
        job.starts_again(times)
    job.trains()
    with job.held():
        slurm.login.check(f"scontrol update JobId={job.number} EndTime=now+60")
    job.starts_again(3)
    slurm.login.check(f"scontrol update JobId={job.number} TimeLimit=20")
    job.trains()
    (rank,) = cluster["host-b"].ranks()
    os.kill(rank, signal.SIGKILL)
    job.starts_again(4)
    job.trains()
    cluster["host-b"].lose_power()
    wait_until(lambda: job.starts == 5, "SLURM misses the host")
    cluster["host-b"].switch_on()
    slurm.start_node(cluster["host-b"])
    ended = slurm.end(job.number, 180)
    assert ended["JobState"] == "COMPLETED", job.said(str(ended))
    log = job.log.read_text()
    codes = [line.split()[-1] for line in log.splitlines() if " ended with code " in line]
    # At the loss of a host nobody was left to tell.
    assert len(codes) == 5 and codes[:3] == ["75"] * 3 and codes[4] == "0", log
    # The rank that was killed, or one that srun ended for it.
    assert codes[3] in ("137", "143", "1"), log
    assert log.count("run complete") == 1
    is_the_calm_run(job.run)
    assert job.starts == 5 and slurm.queue() == ""


def test_a_cut_network(cluster, slurm, file):
    # Saves and evaluations may take four times as long as a step: SLURM would be first to act.
    rare = ("checkpoint.every_tokens=20480", "evaluate.every_tokens=0")
    job = Job(cluster, slurm, file, "log.watchdog_minutes=0.2", *rare)
    job.trains_on()
    with cluster["host-b"].unplugged():
        stacks = [job.run / "stacks" / f"rank_0000{rank}.txt" for rank in range(2)]
        wait_until(lambda: all(path.exists() for path in stacks), "both ranks write stacks")
        wait_until(lambda: not any(host.ranks() for host in slurm.nodes), "both ranks end")
        wait_until(lambda: job.starts == 1, "SLURM queues the job again")
    for path in stacks:
        assert "no end of this step within 0.2 minutes" in path.read_text()
        assert "megagpt/train.py" in path.read_text()
    assert slurm.end(job.number, 180)["JobState"] == "COMPLETED", job.said("not completed")
    is_the_calm_run(job.run)


def test_a_run_that_is_wrong_is_not_tried_again(slurm, file, tmp_path):
    log = tmp_path / "log"
    options = (*TWO_HOSTS, f"--output={log}")
    job = slurm.submit(*options, "launch/slurm.sbatch", file, "modle=x")
    ended = slurm.end(job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    assert "unknown key 'modle' (did you mean 'model'?)" in log.read_text()


def test_a_job_that_is_submitted_without_an_environment(slurm, file, tmp_path):
    log = tmp_path / "log"
    options = (*TWO_HOSTS, "--export=NONE", f"--output={log}")
    short = ("schedule.total_tokens=4096", f"output={tmp_path}/run")
    job = slurm.submit(*options, "launch/slurm.sbatch", file, *short)
    assert slurm.end(job)["JobState"] == "COMPLETED", log.read_text()
    assert "run complete" in log.read_text()


@pytest.mark.parametrize("short", ["host-a,host-b", "n[8-11]", "r[1-2]n[08-10,12],x"])
def test_lists_of_hosts_are_read_as_scontrol_does(slurm, short):
    assert expand_hosts(short) == slurm.login.check(f"scontrol show hostnames {short}").split()

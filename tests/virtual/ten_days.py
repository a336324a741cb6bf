"""Ten days of a run under SLURM in minutes: failures by an exponential clock, and nobody looks.

    python -m tests.virtual.ten_days --seeds 20 --limit-s 900

A step stands for 20 minutes, so that 720 of them are ten days; every second one is saved (175b
saves every 41 minutes). Failures come 14 hours apart in the mean, drawn by the seed: a rank is
killed, on a random host or, three times, on one that is bad; a host loses power; SLURM preempts.
One failure in five is followed by another while the job starts. The job must end by itself,
complete, with the calm run's steps, weights and moments. Prints a line of JSON for each seed;
tests/virtual/goodput.py holds what it cost against `megagpt plan --simulate`.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megagpt.cluster.slurm import expand_hosts
from megagpt.errors import MegagptError
from megagpt.report.series import read_run
from tests.lib.corpus import run_file
from tests.lib.distributed import digest_of_weights, exact, launch, steps
from tests.virtual.hosts import Cluster, Host, virtual_hosts, wait_until
from tests.virtual.slurm import Slurm

STEPS_A_DAY = 72
MEAN_STEPS = 42.0
"""Between two failures."""
TWO_HOSTS = ("-N2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
KINDS = {"rank": 0.75, "power": 0.1, "preempted": 0.15}
BAD_TIMES = 3
"""Failures of the bad host, after which it is to be left out."""


def made(root: Path, days: float) -> Path:
    """A run file of so many days, whose calm run lies in `calm`."""
    tokens = 256 * round(days * STEPS_A_DAY)
    schedule = {
        "total_tokens": tokens,
        "batch_tokens": 256,
        "ramp_start_tokens": 256,
        "ramp_tokens": 0,
    }
    rare = {"evaluate": {"every_tokens": 0}, "checkpoint": {"every_tokens": 512}}
    file = run_file(root, schedule=schedule, model={"dropout": 0.1}, **rare)
    done = launch(file, 2, f"output={root}/calm", timeout_s=600)
    assert done.returncode == 0, done.stderr
    return file


class Unattended:
    """One job, and what happens to it."""

    def __init__(self, cluster: Cluster, slurm: Slurm, file: Path, seed: int) -> None:
        self.cluster, self.slurm, self.draw = cluster, slurm, random.Random(seed)
        self.run, self.log = file.parent / f"run{seed}", file.parent / f"log{seed}"
        options = (*TWO_HOSTS, "--time=60", f"--output={self.log}")
        environ = f"--export=ALL,EXCLUDE_AFTER={BAD_TIMES},RETRIES=8"
        words = ("launch/slurm.sbatch", file, f"output={self.run}")
        self.number = slurm.submit(*options, environ, *words)
        self.count = {"rank": 0, "power": 0, "preempted": 0, "start": 0, "bad": 0}

    @property
    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    @property
    def step(self) -> int:
        """The latest step in the record."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = (self.run / "metrics.jsonl").read_bytes().splitlines()
            return max(json.loads(line).get("step", 0) for line in lines[-3:])
        return 0

    def hosts(self) -> list[Host]:
        """Where the job has ranks now."""
        # One look: between two the job may have ended, and has no nodes then.
        job = self.slurm.job(self.number)
        names = expand_hosts(job["NodeList"]) if job["JobState"] == "RUNNING" else []
        return [self.cluster[name] for name in names if self.cluster[name].ranks()]

    def until_step(self, step: float) -> bool:
        """Waits for the job to train at `step`; whether it still does then."""
        # Days may pass without a failure, on a machine that is busy with others.
        wait_until(
            lambda: self.over() or (self.step >= step and self.hosts()), f"step {step}", 3600
        )
        return not self.over()

    def over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "NODE_FAIL")

    def fail(self, kind: str) -> None:
        """One failure. What has ended by itself in this instant fails no more."""
        hosts = self.hosts()
        if not hosts:
            return
        bad = next((h for h in hosts if h.name == "host-b"), None)
        host = self.draw.choice(hosts)
        if kind == "rank" and bad and self.count["bad"] < BAD_TIMES:
            host, kind = bad, "bad"
        self.count[kind] += 1
        if kind == "power":
            self.lose(host)
        elif kind == "preempted":
            self.slurm.login.run("scancel", "--batch", "--signal=USR1", str(self.number))
        else:
            for process in host.ranks():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        self.gone(hosts)

    def gone(self, hosts: list[Host]) -> None:
        """Returns when this start has ended everywhere."""
        wait_until(lambda: self.over() or not any(h.ranks() for h in hosts), "all ranks end")

    def lose(self, host: Host) -> None:
        """The host is without power until SLURM has noticed."""
        host.lose_power()
        before = self.slurm.job(self.number)["Restarts"]
        wait_until(
            lambda: self.over() or self.slurm.job(self.number)["Restarts"] != before, "missed"
        )
        host.switch_on()
        self.slurm.start_node(host)

    def fail_in_start(self) -> None:
        """A rank is killed before it has made a step."""
        before = self.step
        wait_until(lambda: self.over() or self.hosts(), "the next start")
        time.sleep(self.draw.uniform(0, 4))
        for host in self.hosts()[:1] if self.step <= before else []:
            self.count["start"] += 1
            for process in host.ranks():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self.gone(self.hosts())

    def live(self, days: float) -> dict[str, Any]:
        """The whole run; what happened. Raises AssertionError where it does not end well."""
        t0, step, last = time.monotonic(), 0.0, days * STEPS_A_DAY
        while (step := step + self.draw.expovariate(1 / MEAN_STEPS)) < last:
            if not self.until_step(step):
                break
            self.fail(self.draw.choices(list(KINDS), list(KINDS.values()))[0])
            if self.draw.random() < 0.2:
                self.fail_in_start()
        ended = self.slurm.end(self.number, 600)
        said = self.log.read_text()
        assert ended["JobState"] == "COMPLETED" and said.count("run complete") == 1, said[-3000:]
        calm = self.run.parent / "calm"
        assert exact(steps(self.run)) == exact(steps(calm)), said[-3000:]
        assert digest_of_weights(self.run) == digest_of_weights(calm)
        return {
            "failures": self.count,
            "restarts": int(ended["Restarts"]),
            "left_out": ended["ExcNodeList"],
            "seconds": round(time.monotonic() - t0),
            **costs(self.run),
        }


def costs(folder: Path) -> dict[str, Any]:
    """What a run's record says that failures cost, seconds where nothing else is said: steps that
    count, from the first line to the last, waiting for checkpoints, a checkpoint's way to the
    disk; and for each restart the steps that it lost and the time without a step."""
    run = read_run(folder)
    saves = [event for event in run.events if event["event"] == "checkpoint"]
    return {
        "steps": len(run.steps),
        "useful_s": round(float(run.step_s.sum()), 3),
        "wall_s": round(run.wall_s, 3),
        "stall_s": round(sum(event["stall_s"] for event in saves), 3),
        "save_s": round(statistics.mean(event["save_s"] for event in saves), 3),
        "lost_steps": [event["lost_steps"] for event in run.restarts],
        "down_s": [event["down_s"] for event in run.restarts],
    }


def main() -> int:
    """Runs seed after seed as long as there is time; 1 where one did not end well."""
    parser = argparse.ArgumentParser(description="Ten days unattended, in minutes.")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--days", type=float, default=10.0)
    parser.add_argument("--limit-s", type=float, default=900.0, help="begin no seed after it")
    args = parser.parse_args()
    folder, root = (Path(tempfile.mkdtemp(prefix=name)) for name in ("hosts-", "ten-days-"))
    t0, wrong = time.monotonic(), 0
    try:
        file = made(root, args.days)
        with virtual_hosts(folder, "login", "host-a", "host-b", "host-c") as cluster:
            slurm = Slurm(cluster)
            slurm.start_node(slurm.spare)
            for seed in range(args.first, args.first + args.seeds):
                if time.monotonic() - t0 > args.limit_s:
                    break
                try:
                    told = Unattended(cluster, slurm, file, seed).live(args.days)
                except (AssertionError, MegagptError) as error:
                    wrong += 1
                    told = {"wrong": str(error)}
                    slurm.login.check("scancel --user=root")
                print(json.dumps({"seed": seed} | told), flush=True)
    finally:
        for path in (folder, root):
            shutil.rmtree(path, ignore_errors=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

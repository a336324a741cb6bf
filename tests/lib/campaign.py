"""A fault campaign: kill -9 at random moments, the same command again, the same weights at the end.

    python -m tests.lib.campaign --kills 50 --ranks 2 --launcher torchrun --seed 1 --output DIR

Each round draws whom to kill (one rank, the launcher, or all of them at once) and when: while the
ranks start up, anywhere in training, or while a checkpoint is being written (a `.tmp` folder is
there). After the last kill the run goes on to its end. It must then be, bit for bit, the run that
was never killed: every step of metrics.jsonl, the weights and both moments of Adam. Prints one
JSON object with the figures; exit code 1 when anything differs.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.checkpoint import list_checkpoints, verify
from tests.lib.corpus import run_file
from tests.lib.distributed import (
    EXACT,
    digest_of_weights,
    exact,
    finish,
    kill_all,
    launch,
    start,
    steps,
    workers,
)

VICTIMS = ("rank", "launcher", "all")
MOMENTS = ("start", "training", "saving")
WEIGHTS = (0.1, 0.3, 0.6)
"""How often each moment is drawn; saving takes far less than this share of a run's time."""


@dataclass
class Figures:
    """What a campaign did."""

    kills: int = 0
    seconds: float = 0.0
    steps: int = 0
    moments: collections.Counter[str] = field(default_factory=collections.Counter)
    victims: collections.Counter[str] = field(default_factory=collections.Counter)
    half_written: int = 0
    """Kills that left a checkpoint half-written."""
    finished_early: int = 0
    """Rounds in which the run ended before the kill came."""
    steps_lost: int = 0
    """Steps trained again."""
    seconds_to_end: list[float] = field(default_factory=list)
    """From the kill to the end of the last process, each round."""
    same_steps: bool = False
    same_weights: bool = False


@dataclass
class Campaign:
    """Kills the run of `file` again and again, then compares it with `expected`."""

    file: Path
    expected: Path
    ranks: int
    launcher: str
    draw: random.Random
    figures: Figures = field(default_factory=Figures)

    @property
    def run(self) -> Path:
        return self.file.parent / "run"

    def round(self, moment: str = "", victim: str = "") -> None:
        """Starts the run, kills it at the moment (drawn unless given), looks at what is left."""
        moment = moment or self.draw.choices(MOMENTS, WEIGHTS)[0]
        victim = victim or self.draw.choice(VICTIMS)
        process = start(self.file, self.ranks, launcher=self.launcher)
        before = self.last_step()
        if not self.wait(process, moment, before):
            done = finish(process)
            assert done.returncode == 0, done.stderr
            self.figures.finished_early += 1
            return
        ranks = workers(process)
        if victim == "rank" and not ranks:
            victim = "all"
        self.kill(process, ranks, victim)
        t0 = time.monotonic()
        while left := [pid for pid in ranks if Path(f"/proc/{pid}").exists()]:
            if time.monotonic() - t0 > 60:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"{moment}, {victim}: ranks {left} live on after 60 s")
            # Reaps the launcher where it has ended.
            ended_within(process, 0.02)
        finish(process, timeout_s=60)
        self.figures.seconds_to_end.append(time.monotonic() - t0)
        self.figures.kills += 1
        self.figures.moments[moment] += 1
        self.figures.victims[victim] += 1
        self.figures.half_written += bool(list((self.run / "checkpoints").glob("*.tmp")))
        for folder in list_checkpoints(self.run):
            assert verify(folder) == [], f"{folder}: a checkpoint that is there must be whole"
        newest = [int(f.name.partition("_")[2]) for f in list_checkpoints(self.run)[-1:]]
        self.figures.steps_lost += max(0, self.last_step() - (newest or [0])[0])

    def last_step(self) -> int:
        path = self.run / "metrics.jsonl"
        return steps_of(path)[-1] if path.exists() and steps_of(path) else 0

    def wait(self, process: subprocess.Popen[str], moment: str, before: int) -> bool:
        """Until the drawn moment; False when the run ended before it came."""
        if moment == "start":
            return not ended_within(process, self.draw.uniform(0.5, 6.0))
        path, folder = self.run / "metrics.jsonl", self.run / "checkpoints"
        size = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size == size or self.last_step() == before:
            # metrics.jsonl is cut on resuming, so its size changes before its first step.
            if ended_within(process, 0.01):
                return False
            if path.exists() and path.stat().st_size < size:
                size, before = path.stat().st_size, self.last_step()
        if moment == "training":
            return not ended_within(process, self.draw.uniform(0.0, 1.0))
        # Not always the first save after a start, or the run would never get on.
        for _ in range(self.draw.randint(1, 4)):
            for there in (False, True):
                while bool(list(folder.glob("*.tmp"))) != there:
                    if ended_within(process, 0.0005):
                        return False
        return not ended_within(process, self.draw.uniform(0.0, 0.03))

    def kill(self, process: subprocess.Popen[str], ranks: list[int], victim: str) -> None:
        if victim == "all":
            kill_all(process)
            return
        try:
            os.kill(self.draw.choice(ranks) if victim == "rank" else process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def compare(self) -> None:
        """Runs to the end and compares with the run that was never killed."""
        done = launch(self.file, self.ranks, launcher=self.launcher, timeout_s=600)
        assert done.returncode == 0, done.stderr
        found, expected = steps(self.run), steps(self.expected)
        self.figures.steps = len(expected)
        self.figures.same_steps = exact(found) == exact(expected)
        self.figures.same_weights = digest_of_weights(self.run) == digest_of_weights(self.expected)


def ended_within(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the launcher ends within so many seconds; drains nothing."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def steps_of(path: Path, whole: bool = False) -> list[int]:
    """The steps in a metrics.jsonl that is being written: its last ones, or all."""
    found = []
    for line in path.read_bytes()[0 if whole else -4000 :].split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss" in record:
            found.append(record["step"])
    return found


def prepare(root: Path, total_tokens: int, every_tokens: int) -> tuple[Path, Path]:
    """(run file to be killed, run file of the undisturbed run), alike but for their folders."""
    sections = dict(EXACT) | {
        "schedule": {"total_tokens": total_tokens, "ramp_tokens": total_tokens // 2},
        "checkpoint": {"every_tokens": every_tokens, "keep_last": 3},
        "log": {"tensorboard": False, "every_steps": 1_000_000},
        "evaluate": {"every_tokens": total_tokens // 4, "batches": 1},
    }
    whole = run_file(root, **sections)
    broken = root / "broken" / "run.toml"
    broken.parent.mkdir()
    text = whole.read_text()
    broken.write_text(text.replace(f'output = "{root}/run"', f'output = "{root}/broken/run"'))
    return broken, whole


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kill -9 (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    parser.add_argument("--total-tokens", type=int, default=1_500_000, help="length of the run")
    parser.add_argument("--every-tokens", type=int, default=8192, help="between checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="new folder for all files")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    broken, whole = prepare(args.output.resolve(), args.total_tokens, args.every_tokens)
    t0 = time.monotonic()
    done = launch(whole, args.ranks, launcher=args.launcher, timeout_s=1200)
    assert done.returncode == 0, done.stderr
    draw = random.Random(args.seed)
    campaign = Campaign(broken, whole.parent / "run", args.ranks, args.launcher, draw)
    while campaign.figures.kills < args.kills and not campaign.figures.finished_early:
        campaign.round()
        print(campaign.figures.kills, campaign.last_step(), file=sys.stderr, flush=True)
    campaign.compare()
    campaign.figures.seconds = time.monotonic() - t0
    print(json.dumps(vars(campaign.figures), indent=1))
    return 0 if campaign.figures.same_steps and campaign.figures.same_weights else 1


if __name__ == "__main__":
    sys.exit(main())

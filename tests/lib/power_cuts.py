"""A power-cut campaign: the disk as it is at a random moment, the same command again.

    python -m tests.lib.power_cuts --cuts 20 --seed 1 --output DIR       # as root, on Linux

A run writes into an ext4 file system within a file, which is mounted so that nothing reaches the
file but what was flushed (fsync) and what the kernel chose to write. Each round stops the ranks at
a drawn moment, in training or while a checkpoint is being written, and copies that file: this is
what a disk holds when the power goes. What was mounted is thrown away, the copy is mounted in its
place, and the run goes on. Every checkpoint there must be whole, and the record must have every
step up to the newest; at its end the run is, bit for bit, the run that nobody cut. Prints one JSON
object with the figures; exit code 1 when anything differs.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.checkpoint import list_checkpoints, verify
from megagpt.checkpoint.record import read_record
from tests.lib.campaign import Campaign, prepare, steps_of
from tests.lib.distributed import descendants, finish, kill_all, launch, start

DISK_BYTES = 128 << 20
MOMENTS = ("training", "saving")


@dataclass
class Found:
    """What a campaign did, and what the cut disks held."""

    cuts: int = 0
    moments: list[str] = field(default_factory=list)
    checkpoints: int = 0
    """Checkpoints on the cut disks; each was verified."""
    half_written: int = 0
    """Cuts that left a checkpoint without its end."""
    lines_lost: int = 0
    """Lines of metrics.jsonl that the run had written and the disk had not."""
    damaged: int = 0
    """Checkpoints that count and are not whole, and records without a step before one."""
    same_steps: bool = False
    same_weights: bool = False


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    """The file system in `image`, which keeps back for ten minutes what nobody flushes."""
    subprocess.run(["mount", "-o", "loop,commit=600", str(image), str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def cut(campaign: Campaign, found: Found, image: Path) -> Path | None:
    """Trains to a drawn moment; the copy of the disk then. None when the run ended before."""
    moment = campaign.draw.choice(MOMENTS)
    process = start(campaign.file, campaign.ranks, launcher=campaign.launcher)
    if not campaign.wait(process, moment, campaign.last_step()):
        assert finish(process).returncode == 0
        return None
    for pid in (process.pid, *descendants(process)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    copy = image.with_suffix(".cut")
    shutil.copyfile(image, copy)
    found.lines_lost += lines(campaign.run)
    kill_all(process)
    process.communicate()
    found.cuts += 1
    found.moments.append(moment)
    return copy


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def look(campaign: Campaign, found: Found) -> None:
    """Judges the disk after a cut, before anything is started on it."""
    run = campaign.run
    found.lines_lost -= lines(run)
    found.half_written += bool(list((run / "checkpoints").glob("*.tmp")))
    folders = list_checkpoints(run)
    found.checkpoints += len(folders)
    found.damaged += sum(verify(folder) != [] for folder in folders)
    if folders:
        there = set(steps_of(run / "metrics.jsonl", whole=True))
        found.damaged += not there >= set(range(1, read_record(folders[-1]).step + 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cuts", type=int, default=20, help="power cuts (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    parser.add_argument("--total-tokens", type=int, default=700_000, help="length of the run")
    parser.add_argument("--every-tokens", type=int, default=8192, help="between checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="new folder for all files")
    args = parser.parse_args()
    root = args.output.resolve()
    root.mkdir(parents=True)
    broken, whole = prepare(root, args.total_tokens, args.every_tokens)
    done = launch(whole, args.ranks, timeout_s=1200)
    assert done.returncode == 0, done.stderr
    image, found = root / "disk.img", Found()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    campaign = Campaign(broken, root / "run", args.ranks, "torchrun", random.Random(args.seed))
    campaign.run.mkdir(exist_ok=True)
    going = True
    while going and found.cuts < args.cuts:
        with mounted(image, campaign.run):
            if found.cuts:
                look(campaign, found)
            copy = cut(campaign, found, image)
        going = copy is not None
        if copy:
            copy.replace(image)
        print(found.cuts, found.checkpoints, found.lines_lost, file=sys.stderr, flush=True)
    with mounted(image, campaign.run):
        if going:
            look(campaign, found)
        campaign.compare()
    found.same_steps = campaign.figures.same_steps
    found.same_weights = campaign.figures.same_weights
    print(json.dumps(vars(found) | {"moments": dict.fromkeys(MOMENTS, 0) | count(found.moments)}))
    return 0 if found.same_steps and found.same_weights and not found.damaged else 1


def count(moments: list[str]) -> dict[str, int]:
    return {moment: moments.count(moment) for moment in moments}


if __name__ == "__main__":
    sys.exit(main())

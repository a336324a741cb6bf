"""Corpora that each host of a job copies to a disk of its own before its ranks start."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.corpus import run_file
from tests.lib.distributed import steps
from tests.virtual.hosts import MEGAGPT, Host
from tests.virtual.slurm import Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

TWO_HOSTS = ("-N2", "--gpus-per-node=1", "--cpus-per-task=1")


@contextlib.contextmanager
def disks(hosts: list[Host], place: Path, *sizes: str) -> Iterator[None]:
    """A disk of its own on each host."""
    place.mkdir()
    with contextlib.ExitStack() as mounted:
        for host, size in zip(hosts, sizes, strict=True):
            host.check(f"mount -t tmpfs -o size={size} none {place}")
            mounted.callback(host.check, f"umount {place}")
        yield


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A run that reads its corpora from the disk of its host."""
    path = run_file(tmp_path, schedule={"total_tokens": 4096})
    path.write_text(path.read_text().replace(f'path = "{tmp_path}/', f'path = "{tmp_path}/disk/'))
    return path


def staged(slurm: Slurm, file: Path) -> tuple[dict[str, str], str]:
    """The job at its end, and its log."""
    root, log = file.parent, file.parent / "log"
    export = f"--export=ALL,STAGE={root}/train {root}/validation,STAGE_TO={root}/disk"
    options = (*TWO_HOSTS, "--ntasks-per-node=1", export, f"--output={log}")
    ended = slurm.end(slurm.submit(*options, "launch/slurm.sbatch", file))
    return ended, log.read_text()


def copied(said: str) -> list[int]:
    """Bytes that processes copied."""
    return sorted(int(n.replace(",", "")) for n in re.findall(r": ([\d,]+) bytes copied", said))


def test_each_host_copies_once_and_trains_on_its_own_copy(slurm, file, tmp_path):
    with disks(slurm.nodes, tmp_path / "disk", "9m", "9m"):
        ended, said = staged(slurm, file)
        assert ended["JobState"] == "COMPLETED", said
        folders = [tmp_path / "train", tmp_path / "validation"]
        sizes = [sum(p.stat().st_size for p in folder.iterdir()) for folder in folders]
        assert copied(said) == sorted(2 * sizes)
        assert steps(tmp_path / "run")[-1]["tokens"] >= 4096
        verified = sorted(p.stem for p in (tmp_path / "run/verified").iterdir())
        assert verified == ["host-a", "host-b"]
        # Of what is damaged on one host, that host's process copies; of two there, one.
        (shard, *_) = sorted((tmp_path / "train").glob("*.bin"))
        slurm.nodes[1].check(f"printf x | dd of={tmp_path}/disk/train/{shard.name} conv=notrunc")
        words = (*MEGAGPT, "data", "stage", *map(str, folders), str(tmp_path / "disk"))
        code, said = slurm.login.run("srun", *TWO_HOSTS, "--ntasks-per-node=2", *words)
        again = shard.stat().st_size + (tmp_path / "train/manifest.json").stat().st_size
        assert (code, copied(said)) == (0, [*7 * [0], again]), said


def test_a_host_without_room_ends_the_job(slurm, file, tmp_path):
    with disks(slurm.nodes, tmp_path / "disk", "9m", "64k"):
        ended, said = staged(slurm, file)
        assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0"), said
        needed = sum(path.stat().st_size for path in (tmp_path / "train").iterdir())
        told = rf"1: megagpt: {tmp_path}/disk/train: {needed:,} bytes are needed and [\d,]+ are"
        assert re.search(told, said) and "Traceback" not in said, said
        assert slurm.nodes[1].check(f"ls {tmp_path}/disk/train") == ""
    assert not (tmp_path / "run/metrics.jsonl").exists()

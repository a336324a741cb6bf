"""Real trainings as real processes: every launcher, killed whole when they take too long."""

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint import list_checkpoints
from megagpt.checkpoint.slice_file import SliceReader
from megagpt.cluster.process import join, leave, prepare_environment
from megagpt.cluster.ranks import Ranks
from megagpt.engine.slices import STATES
from megagpt.log import read_metrics
from tests.lib.corpus import run_file

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("python", "torchrun", "deepspeed")
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """This process's environment without another launcher's marks, one thread a rank."""
    found = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES and "SLURM" not in k}
    found |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    # torch tells on every rank which of its functions DeepSpeed should no longer call.
    return found | {"PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning"}


def command(file: Path, ranks: int, *arguments: str, launcher: str = "torchrun") -> list[str]:
    """The command line that trains `file` on `ranks` ranks of this machine."""
    train = ["megagpt.train", str(file), *arguments]
    if launcher == "python":
        assert ranks == 1
        return [sys.executable, "-m", *train]
    if launcher == "torchrun":
        place = [f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
        return [sys.executable, "-m", "torch.distributed.run", *place, "-m", *train]
    assert launcher == "deepspeed", launcher
    place = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
    script = Path(sys.executable).with_name("deepspeed")
    return [sys.executable, str(script), *place, "--module", *train]


def start(
    file: Path, ranks: int, *arguments: str, launcher: str = "torchrun", **more: Any
) -> subprocess.Popen[str]:
    """Starts a training in a process group of its own; see finish()."""
    return _start(command(file, ranks, *arguments, launcher=launcher), **more)


def _start(line: list[str], **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,
    )


def finish(
    process: subprocess.Popen[str], timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Waits for a training's end; kills all its processes and raises when it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_all(process)
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout_s} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def launch(
    file: Path, ranks: int, *arguments: str, launcher: str = "torchrun", timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Trains to the end and returns exit code and output; arguments are overrides or options."""
    return finish(start(file, ranks, *arguments, launcher=launcher), timeout_s)


def run_together(line: list[str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """The end of any command that starts ranks."""
    return finish(_start(line), timeout_s)


def trained(file: Path, ranks: int, *arguments: str, **how: Any) -> list[dict[str, Any]]:
    """Trains to the end, which must be a good one; the records of the run's steps."""
    done = launch(file, ranks, *arguments, **how)
    assert done.returncode == 0, done.stderr
    outputs = [a.partition("=")[2] for a in arguments if a.startswith("output=")]
    return steps(Path(outputs[-1]) if outputs else file.parent / "run")


def steps(run: Path) -> list[dict[str, Any]]:
    """The records of a run's steps; each step once and in order, or it is an error."""
    found = [r for r in read_metrics(run) if "loss" in r]
    assert [r["step"] for r in found] == list(range(1, len(found) + 1))
    return found


def exact(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What two runs that are the same share bit for bit."""
    keys = ("step", "tokens", "samples", "batch_tokens", "loss", "grad_norm", "lr", "digest")
    return [tuple(record[key] for key in keys) for record in records]


# --- processes ----------------------------------------------------------------------------------


def python(
    code: str, *words: str, folder: Path = ROOT, timeout_s: float = 250
) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def descendants(process: subprocess.Popen[str]) -> list[int]:
    """Ids of the live processes below `process`, found by /proc, the oldest first."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found, front = [], [process.pid]
    while front:
        front = [pid for pid, parent in parents.items() if parent in front]
        found += front
    return sorted(found)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Ids of the ranks: the processes below `process` that have RANK in their environment."""
    found = []
    for pid in [process.pid, *descendants(process)]:
        try:
            marks = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(mark.startswith(b"RANK=") for mark in marks) and b"-m" in words:
            found.append(pid)
    return found


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 of the launcher and everything below it, nothing else."""
    for pid in [*descendants(process), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for_end(processes: list[int], why: str, timeout_s: float = 200) -> None:
    """Returns once none of the processes lives. The limit is for a hang, not for a busy machine."""
    until = time.monotonic() + timeout_s
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        assert time.monotonic() < until, f"{processes} {why}"
        time.sleep(0.1)


def wait_for_step(run: Path, step: int, timeout_s: float = 90) -> None:
    """Returns once metrics.jsonl has the record of `step`."""
    until = time.monotonic() + timeout_s
    path = run / "metrics.jsonl"
    while time.monotonic() < until:
        if path.exists() and f'"step": {step},'.encode() in path.read_bytes():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path}: step {step} did not come within {timeout_s} s")


# --- runs that several tests look at ------------------------------------------------------------

EXACT = {
    "model": {"dropout": 0.1},
    "parallel": {"ds_config": "zero1", "micro_batch": 2, "dtype": "bf16"},
    "checkpoint": {"every_tokens": 2048, "keep_last": 3, "keep_every_tokens": 4096},
}
"""ZeRO-1 in bf16 with dropout: everything that a resume could get wrong."""


@functools.cache
def undisturbed() -> Path:
    """A folder with corpora, run.toml and run/, trained by two ranks without a break; read only."""
    root = Path(tempfile.mkdtemp(prefix="megagpt-test-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    done = launch(run_file(root, **EXACT), 2)
    assert done.returncode == 0, done.stderr
    return root


def digest_of_weights(run: Path) -> str:
    """digest_of_checkpoint of a run's newest one."""
    return digest_of_checkpoint(list_checkpoints(run)[-1])


def digest_of_checkpoint(folder: Path) -> str:
    """sha256 over a checkpoint's weights and moments, by name."""
    reader = SliceReader(folder)
    digest = hashlib.sha256()
    for name in reader.names:
        for key in STATES:
            digest.update(f"{name} {key}".encode())
            digest.update(reader.full(name, key).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """A process group of this process alone; the environment is put back afterwards.

    Joined once and left at the end of the process: DeepSpeed keeps groups of its own beyond the
    group that they belong to.
    """
    before = dict(os.environ)
    os.environ.update(_joined_alone())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def _joined_alone() -> dict[str, str]:
    """Joins; the variables that torch and DeepSpeed look for."""
    # As the trainer does; on a GPU it would last for the kernels that other tests compile.
    found: dict[str, str] = {} if torch.cuda.is_available() else {"TORCHDYNAMO_DISABLE": "1"}
    prepare_environment(Ranks(), found)
    os.environ.update(found)
    join(Ranks())
    atexit.register(leave)
    return found

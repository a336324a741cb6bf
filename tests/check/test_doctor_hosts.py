"""The doctor over ranks and hosts: real processes, a host with a name and mounts of its own."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from megagpt.check import bandwidth
from megagpt.check.findings import OK, WARN, Order
from megagpt.check.ssh import command, deepspeed_environment
from megagpt.errors import MegagptError
from tests.lib.corpus import run_file
from tests.lib.distributed import (
    ROOT,
    environment,
    free_port,
    group_of_one,
    run_together,
    undisturbed,
)

OTHER = ["unshare", "--map-root-user", "--uts", "--mount", "bash", "-c"]
"""A process that may have another host name, and mounts of its own."""


def can_be_another_host():
    try:
        done = subprocess.run([*OTHER, "hostname other && mount -t tmpfs none /mnt"], timeout=10)
    except OSError:
        return False
    return done.returncode == 0


needs_hosts = pytest.mark.skipif(
    not can_be_another_host(), reason="this kernel gives no other host name to a process (unshare)"
)


def failures(text):
    return re.findall(r"(?m)^FAIL  (.+?)  +(.+)", text)


# --- ranks --------------------------------------------------------------------------------------


def test_two_ranks_of_one_host():
    place = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    run = ["-m", "megagpt.doctor", str(undisturbed() / "run.toml"), "--wait", "60"]
    done = run_together([sys.executable, *place, *run])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"ok +layout +2 ranks = data 2\n", done.stdout)
    assert re.search(r"ok +all-reduce +2 ranks sum 16 MiB in [\d.]+ ms: [\d.]+ GB/s", done.stdout)
    assert re.search(r"ok +shared files +/", done.stdout)
    assert not list(undisturbed().rglob(".megagpt-doctor-*"))


def ranks(first, second, *arguments, **variables):
    """Ends of rank 0 here and rank 1, begun by the words `second`, elsewhere."""
    marks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    marks |= {"LOCAL_RANK": "0", "LOCAL_SIZE": "1"} | variables
    line = [sys.executable, "-m", "megagpt.doctor", *map(str, arguments), "--wait", "60"]
    processes = [
        subprocess.Popen(
            [*how, *line],
            cwd=ROOT,
            env=environment() | marks | {"RANK": str(rank)} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (how, more) in enumerate([first, second])
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *texts)
        for p, texts in zip(processes, outputs, strict=True)
    ]


@needs_hosts
def test_a_host_with_other_code_without_shards_and_without_the_shared_folder(tmp_path):
    path = run_file(tmp_path)
    (tmp_path / "run").mkdir()
    code = tmp_path / "older"
    shutil.copytree(ROOT / "megagpt", code / "megagpt")
    with (code / "megagpt" / "schedule.py").open("a") as file:
        file.write("# an older copy\n")
    (code / "ds_configs").symlink_to(ROOT / "ds_configs")
    hide = " && ".join(f"mount -t tmpfs none {tmp_path}/{name}" for name in ("train", "run"))
    other = [*OTHER, f'hostname other && {hide} && cd {code} && exec "$0" "$@"']
    loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    here, there = ranks(([], {}), (other, {"PYTHONPATH": str(code)}), path, **loopback)
    assert (here.returncode, there.returncode) == (2, 2), here.stderr + there.stderr
    assert there.stdout == ""
    found = failures(here.stdout)
    assert [name for name, _ in found].count("same on all") == 2
    text = "\n".join(detail for _, detail in found)
    assert re.search(r"other: .*/run: a file that another host wrote there: No such file", text)
    assert re.search(r"other: .*/train holds no manifest.json", text)
    assert re.search(r"the code of megagpt is not the same on all hosts: sha256 \w+ on", text)
    assert re.search(rf"{tmp_path}/train is not the same on all hosts: 3 shards .* on", text)
    assert re.search(r"ok +clocks +within 0\.\d+ s", here.stdout)
    assert re.search(r"ok +all-reduce +2 ranks", here.stdout)


def test_an_all_reduce_that_cannot_begin():
    # Rank 1 finds no interface; rank 0 would wait for it for half an hour.
    broken = {"GLOO_SOCKET_IFNAME": "nosuch0"}
    here, there = ranks(([], {}), ([], broken))
    assert (here.returncode, there.returncode) == (2, 2)
    (found,) = failures(here.stdout)
    assert found[0] == "all-reduce"
    assert "rank 0: waited for the others in vain" in here.stdout
    assert re.search(r"rank 1: .*nosuch0", here.stdout)
    assert "-> see the interface above; set GLOO_SOCKET_IFNAME" in here.stdout


def test_a_rank_that_does_not_come():
    marks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    marks |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megagpt.doctor", "--wait", "3"],
        cwd=ROOT,
        env=environment() | marks,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert re.search(r"megagpt: rank 1 of 2 did not come within 0.05 minutes", done.stderr)


def test_sums_that_are_wrong():
    # A group of one that is told it is two gets half of the sum.
    with group_of_one(), pytest.raises(MegagptError, match=r"4194304 of 4194304 sums are not 3"):
        bandwidth.measure(rank=0, world=2)


def test_speeds_that_differ():
    quick = bandwidth.check_all_reduce(0.01, 256 * 2**20, 8, gpus=True)
    assert quick.status == OK and "8 ranks sum 256 MiB in 10.0 ms: 47 GB/s" in quick.detail
    slow = bandwidth.check_all_reduce(1.0, 256 * 2**20, 8, gpus=True)
    assert slow.status == WARN and "NCCL_DEBUG=INFO" in slow.remedy
    assert bandwidth.check_all_reduce(1.0, 16 * 2**20, 8, gpus=False).status == OK
    one = bandwidth.check_speeds([6e14, 6e14, 4e14, 6.2e14], ["a", "a", "b", "b"])
    assert (one.status, one.detail) == (
        WARN,
        "400 to 620 TFLOP/s of matrix products; slow: rank 2 on b",
    )
    assert bandwidth.check_speeds([6e14, 5.9e14], ["a", "b"]).status == OK


# --- hostfile -----------------------------------------------------------------------------------


def test_what_deepspeed_exports_reaches_the_hosts(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("A=1\nGLOO_SOCKET_IFNAME=eth0\n\n")
    (tmp_path / ".deepspeed_env").write_text("A=2=3\nnonsense\n")
    found = deepspeed_environment([tmp_path / "home", tmp_path])
    assert found == {"A": "2=3", "GLOO_SOCKET_IFNAME": "eth0"}
    order = Order(run="run file.toml", overrides=("seed=1",), full=True)
    words = command(order, {"PYTHONPATH": "/x", "HOME": "/y", "NCCL_DEBUG": "INFO"})
    assert words.startswith(f"cd {os.getcwd()} && env PYTHONPATH=/x NCCL_DEBUG=INFO ")
    assert json.loads(shlex.split(words)[-1]) == dataclasses.asdict(order) | {
        "overrides": ["seed=1"],
        "shared_file": ["", ""],
    }


def by_ssh(hosts, environ, *arguments, tmp_path):
    (tmp_path / "hosts").write_text(hosts)
    line = [sys.executable, "-m", "megagpt", "doctor", "--hostfile", str(tmp_path / "hosts")]
    return subprocess.run(
        [*line, *map(str, arguments)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_host_that_is_lost_meanwhile_is_not_waited_for(tmp_path):
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/words; exit 255\n')
    (tmp_path / "ssh").chmod(0o755)
    environ = environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = by_ssh("me@localhost slots=1\n", environ, tmp_path=tmp_path)
    assert failures(done.stdout) == [("reach", "exit code 255")]
    words = (tmp_path / "words").read_text()
    # A user's name is no part of an address.
    assert " -oServerAliveInterval=15 me@localhost cd " in words
    assert '"master": "localhost"' in words


def test_without_ssh(tmp_path):
    environ = environment() | {"PATH": str(tmp_path)}
    done = by_ssh("localhost slots=1\n", environ, tmp_path=tmp_path)
    assert done.returncode == 2
    assert failures(done.stdout) == [("reach", "ssh is not installed here")]

"""Hosts that cannot train together are named in one sentence; ranks outlive no launcher."""

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints, verify
from tests.lib.corpus import run_file
from tests.lib.distributed import wait_for_step
from tests.virtual.hosts import MEGAGPT, ROOT, Cluster, Host, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

TWO_HOSTS = ("-N2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
ENDLESS = ("schedule.total_tokens=9e9", "checkpoint.every_tokens=0")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return run_file(tmp_path, schedule={"total_tokens": 8192})


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("host-a slots=1\nhost-b slots=1\n")
    return path


@contextlib.contextmanager
def another(host: Host, folder: Path, copy: Path, at: Path | None = None) -> Iterator[Path]:
    """On this host alone, a copy of a folder lies in its place, or in that of `at`."""
    shutil.copytree(folder, copy)
    host.check(f"mount --bind {copy} {at or folder}")
    try:
        yield copy
    finally:
        host.check(f"umount {at or folder}")


# --- hosts that do not go together --------------------------------------------------------------


def doctor(cluster: Cluster, file: Path, hostfile: Path) -> tuple[int, list[str]]:
    """Exit code of the doctor on all hosts of the hostfile, and the rows that did not pass."""
    code, said = cluster["login"].run(*MEGAGPT, "doctor", str(file), "--hostfile", str(hostfile))
    return code, [line for line in said.splitlines() if line.startswith(("FAIL", "megagpt: "))]


def test_hosts_that_are_well(cluster, file, hostfile, tmp_path):
    (tmp_path / "env").write_text("GLOO_SOCKET_IFNAME=eth0\n")
    words = (*MEGAGPT, "doctor", str(file), "--hostfile", str(hostfile))
    code, said = cluster["login"].run(*words, environ={"DS_ENV_FILE": str(tmp_path / "env")})
    assert code == 0 and "FAIL" not in said, said
    assert re.search(r"ok +hostfile +.*hosts: 2 hosts, 2 ranks\n", said)
    assert re.search(r"ok +layout +2 hosts: 2 ranks = data 2\n", said)
    assert re.search(r"ok +interface +2 hosts, such as host-a: eth0", said)
    assert re.search(r"ok +same on all +.*the code of megagpt", said)


def test_hosts_that_the_doctor_does_not_reach(cluster, hostfile, tmp_path):
    names = ("10.77.0.99", "host-b", "no.such.host.invalid")
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
    # host-b has no Python at the place of this one.
    binaries = Path(sys.executable).parent
    (tmp_path / "empty").mkdir()
    with another(cluster["host-b"], tmp_path / "empty", tmp_path / "copy", at=binaries):
        words = (*MEGAGPT, "doctor", "--hostfile", str(hostfile))
        code, said = cluster["login"].run(*words)
    assert code == 2
    rows = re.findall(r"(?m)^FAIL +reach +(.*)$", said)
    assert len(rows) == 3, said
    assert rows[0].startswith("10.77.0.99: ssh: connect to host 10.77.0.99 port 22: No route to ho")
    assert "-> make `ssh 10.77.0.99 true` work without a password" in said
    assert rows[1].startswith("host-b: ") and "No such file or directory" in rows[1]
    assert f"-> install the same checkout and Python there: {sys.executable}" in said
    assert rows[2].startswith("no.such.host.invalid: ")
    assert "-> correct the hostfile, or enter the host in DNS or /etc/hosts" in said


def test_a_host_of_the_hostfile_that_is_not_there(cluster, file, hostfile):
    hostfile.write_text("host-a slots=1\nhost-x slots=1\n")
    code, (row,) = doctor(cluster, file, hostfile)
    assert code == 2 and "host-x: " in row
    environ = {"HOSTFILE": str(hostfile)}
    code, said = cluster["login"].run("launch/multinode.sh", str(file), environ=environ)
    assert code == 2
    assert said.startswith(f"multinode.sh: host-x of {hostfile}: ssh does not reach it, or ")
    assert len(said.splitlines()) == 1


def test_a_hostfile_that_is_none(cluster, file, hostfile):
    hostfile.write_text("host-a slot=1\n")
    code, said = cluster["login"].run(*MEGAGPT, "doctor", str(file), "--hostfile", str(hostfile))
    assert code == 2 and "line 1: 'host-a slot=1': must read `HOST slots=N`" in said
    # What the script says of it: tests/test_shell.py.


def test_a_hostfile_with_fewer_slots_than_the_layout_needs(cluster, file, hostfile):
    hostfile.write_text("host-a slots=1\n")
    layout = ("parallel.ds_config=pipeline", "parallel.pipeline=2")
    environ = {"HOSTFILE": str(hostfile)}
    code, said = cluster["login"].run("launch/multinode.sh", str(file), *layout, environ=environ)
    assert code == 2
    assert said.count("megagpt: ") == 1 and "1 rank" in said, said


def test_a_host_that_does_not_come(cluster, file, hostfile):
    alone = ("--no_ssh", "--no_ssh_check", "--node_rank=0", "--master_addr=host-a")
    words = ("deepspeed", "--hostfile", str(hostfile), *alone, "--module", "megagpt.train")
    code, said = cluster["host-a"].run(*words, str(file), "log.watchdog_minutes=0.1")
    assert code == 1
    assert said.count("megagpt: ") == 1
    assert (
        "megagpt: rank 1 of 2 did not come within 0.1 minutes; the others run on host-a: " in said
    )


def test_other_code_on_one_host(cluster, slurm, file, hostfile, tmp_path):
    with another(cluster["host-b"], ROOT / "megagpt", tmp_path / "copy") as copy:
        with (copy / "errors.py").open("a") as code:
            code.write("# changed\n")
        told, (row,) = doctor(cluster, file, hostfile)
        said = refused(cluster, file)
    problem = "the code of megagpt is not the same on all hosts: sha256 "
    assert told == 2 and problem in row
    assert f"megagpt: {problem}" in said


def test_a_shard_that_one_host_lacks(cluster, slurm, file, hostfile, tmp_path):
    shard = sorted((tmp_path / "train").glob("*.bin"))[-1]
    with another(cluster["host-b"], tmp_path / "train", tmp_path / "copy") as copy:
        (copy / shard.name).unlink()
        told, (row, _) = doctor(cluster, file, hostfile)
        said = refused(cluster, file)
    assert told == 2 and f"host-b: {shard}: missing" in row
    assert f"megagpt: {tmp_path}/train is not the same on all hosts: " in said
    assert f"; {shard} cannot be read (No such file or directory) on host-b\n" in said


def test_a_damaged_copy_on_the_disk_of_one_host(cluster, slurm, file, tmp_path):
    # A shard that the rank of the other host would read, if the two shared them out.
    shard = sorted((tmp_path / "train").glob("*.bin"))[0]
    with another(cluster["host-b"], tmp_path / "train", tmp_path / "copy") as copy:
        data = bytearray((copy / shard.name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / shard.name).write_bytes(data)
        words = ("srun", *TWO_HOSTS, "python", "-m", "megagpt.train", str(file))
        code, said = cluster["login"].run(*words)
    assert code == 3, said
    assert re.search(rf"megagpt: damaged shards:\n  - {shard}: .* \(on host-b\)\n", said), said


def test_a_run_folder_that_a_host_has_for_itself(cluster, slurm, file, tmp_path):
    (tmp_path / "out").mkdir()
    with another(cluster["host-b"], tmp_path / "out", tmp_path / "copy"):
        words = ("srun", *TWO_HOSTS, "python", "-m", "megagpt.train", str(file))
        code, said = cluster["login"].run(*words, f"output={tmp_path}/out/run")
    assert code == 2, said
    assert "is not seen on host-b (No such file or directory); all hosts must share" in said, said


def refused(cluster: Cluster, file: Path) -> str:
    """What a training on both hosts says that ends with exit code 2 and one message."""
    words = ("srun", *TWO_HOSTS, "python", "-m", "megagpt.train", str(file))
    code, said = cluster["login"].run(*words)
    assert code == 2, said
    assert said.count("megagpt: ") == 1 and "Traceback" not in said, said
    assert not (file.parent / "run").exists()
    return said


# --- launchers that die -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "word"),
    [
        ("login", "bin/deepspeed"),
        ("login", "pdsh -S"),
        ("host-b", "-m deepspeed.launcher.launch"),
    ],
)
def test_over_ssh_ranks_outlive_no_launcher(cluster, file, hostfile, host, word):
    script = start(cluster, "launch/multinode.sh", str(file), *ENDLESS, HOSTFILE=str(hostfile))
    wait_for_step(file.parent / "run", 3, 240)
    for process in cluster[host].processes(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    ends_saved(cluster, file)
    script.communicate(timeout=30)
    assert script.returncode != 0


@pytest.mark.parametrize("word", ["bin/torchrun", "slurmstepd"])
def test_in_a_job_ranks_outlive_no_launcher(cluster, slurm, file, word):
    words = ("srun", "-K1", *TWO_HOSTS, "launch/torchrun.sh", str(file), *ENDLESS)
    script = start(cluster, *words)
    wait_for_step(file.parent / "run", 3, 240)
    for process in cluster["host-b"].processes(word):
        os.kill(process, signal.SIGKILL)
    wait_until(lambda: not ranks(cluster), "all ranks end", 30)
    # Without its own process on a host, SLURM waits for the end of the step there.
    slurm.login.check("scancel --user=root")
    script.communicate(timeout=60)
    assert script.returncode != 0


def test_term_to_the_script_saves(cluster, file, hostfile):
    term_saves(cluster, file, hostfile)


def test_term_to_the_script_where_rank_0_has_another_name(cluster, file, hostfile, tmp_path):
    addresses = [cluster[name].address for name in ("host-a", "host-b")]
    hostfile.write_text("".join(f"{address} slots=1\n" for address in addresses))
    (tmp_path / "names").write_text("127.0.0.1 localhost\n")
    cluster["login"].check(f"mount --bind {tmp_path}/names /etc/hosts")
    try:
        term_saves(cluster, file, hostfile)
    finally:
        cluster["login"].check("umount /etc/hosts")


def start(cluster, *words: str, **environ: str):
    """A command on the login host, whose output nobody need read."""
    log = cluster.folder / "log" / "started"
    return cluster["login"].start(
        "bash", "-c", '"$@" > ' + f"{log} 2>&1", "-", *words, environ=environ
    )


def term_saves(cluster: Cluster, file: Path, hostfile: Path) -> None:
    """TERM to launch/multinode.sh, on the login host, lets all ranks save."""
    script = start(cluster, "launch/multinode.sh", str(file), *ENDLESS, HOSTFILE=str(hostfile))
    wait_for_step(file.parent / "run", 3, 240)
    (own,) = cluster["login"].processes("bash launch/multinode.sh")
    os.kill(own, signal.SIGTERM)
    ends_saved(cluster, file)
    script.communicate(timeout=30)
    assert script.returncode == 75


def ranks(cluster: Cluster) -> list[int]:
    return [process for host in cluster.hosts.values() for process in host.ranks()]


def ends_saved(cluster: Cluster, file: Path) -> None:
    """All ranks end within the time that docs/how-to/clusters.md tells, with a whole checkpoint."""
    t0 = time.monotonic()
    wait_until(lambda: not ranks(cluster), "all ranks end", 40)
    print(f"ended after {time.monotonic() - t0:.1f} s")
    (folder,) = list_checkpoints(file.parent / "run")
    assert verify(folder) == []

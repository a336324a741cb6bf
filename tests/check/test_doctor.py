"""The doctor on one host: what is well, and every failure with its remedy."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megagpt.check import machine, network
from megagpt.check.examine import shared_file
from megagpt.check.findings import (
    FAIL,
    OK,
    WARN,
    Check,
    Order,
    Report,
    as_text,
    check_clocks,
    check_same,
    merged,
    report_of,
)
from megagpt.check.machine import Gpu
from megagpt.check.network import Network
from tests.lib.corpus import run_file
from tests.lib.distributed import ROOT, environment, python, undisturbed

H100 = Gpu(name="NVIDIA H100 80GB HBM3", memory_mib=81559, errors=0)


def doctor(*arguments, folder=ROOT, **more):
    return subprocess.run(
        [sys.executable, "-m", "megagpt", "doctor", *map(str, arguments)],
        cwd=folder,
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=120,
    )


def rows(text):
    """Name -> (status, what follows) of the last row of that name."""
    found = {}
    for line in text.splitlines():
        words = line.split(None, 1)
        if words and words[0] in (OK, WARN, FAIL):
            status, rest = words
            name = rest.split("  ")[0]
            found[name] = (status, rest[len(name) :].strip())
    return found


# --- whole examinations -------------------------------------------------------------------------


def test_the_machine_alone_without_torch():
    script = (
        "import sys; from megagpt.cli import main; code = main(['doctor']); "
        "print([n for n in ('torch', 'deepspeed') if n in sys.modules], file=sys.stderr); "
        "sys.exit(code)"
    )
    done = python(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"versions", "GPUs", "cores", "interface", "open files"} <= rows(done.stdout).keys()
    if not shutil.which("nvidia-smi"):
        assert done.stderr.strip() == "[]"


def test_a_run_that_can_begin():
    done = doctor(undisturbed() / "run.toml", "--full")
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done.stdout)
    assert found["layout"] == (OK, "1 rank, the fewest this run can have")
    assert found["shards"][1].endswith("every byte read")
    assert found["disk"][0] == OK
    assert "0 failed" in done.stdout


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    path = run_file(tmp_path)
    (tmp_path / "validation" / "manifest.json").unlink()
    done = doctor(path, "parallel.dtype=fp16", "parallel.ds_config=none")
    assert done.returncode == 2
    found = rows(done.stdout)
    assert [name for name, (status, _) in found.items() if status == FAIL] == [
        "layout",
        "shards",
        "precision",
    ]
    assert "no such" in found["layout"][1] or "does not exist" in found["layout"][1]
    assert "holds .bin files but no manifest.json" in found["shards"][1]
    assert done.stderr == ""


def test_a_run_file_that_cannot_be_read(tmp_path):
    done = doctor(tmp_path / "none.toml")
    assert done.returncode == 2
    assert "cannot read the run file" in rows(done.stdout)["run file"][1]


def test_packages_that_are_missing_end_the_examination(tmp_path):
    # A package without torch and numpy: only the folder of megagpt itself, and its pins.
    pins = tmp_path / "megagpt-0.dist-info"
    pins.mkdir()
    (pins / "METADATA").write_text("Name: megagpt\nVersion: 0\nRequires-Dist: torch==2.13.0\n")
    (tmp_path / "megagpt").symlink_to(ROOT / "megagpt")
    done = subprocess.run(
        [sys.executable, "-S", "-m", "megagpt", "doctor"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert rows(done.stdout) == {"versions": (FAIL, "torch missing")}
    assert "-> pip install torch==2.13.0" in done.stdout


def test_a_hostfile_belongs_to_the_launcher():
    marks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    done = doctor("--hostfile", "hosts", MASTER_ADDR="localhost", MASTER_PORT="1", **marks)
    assert done.returncode == 2
    assert "--hostfile hosts with 2 ranks: give it to the launcher" in done.stderr


# --- versions, GPUs, limits ---------------------------------------------------------------------


def test_pins_are_the_requirements():
    lines = (ROOT / "requirements.txt").read_text().split("# tests and linters")[0].splitlines()
    wanted = dict(line.split("==") for line in lines if "==" in line)
    assert machine.pins() == wanted
    assert machine.installed().keys() == wanted.keys()


def test_versions():
    wanted = {"torch": "2.13.0", "deepspeed": "0.19.8", "numpy": "2.4.6"}
    there = {**wanted, "torch": "2.13.0+cpu"}
    assert machine.check_versions(there, wanted).status == OK
    other = machine.check_versions({**there, "deepspeed": "0.18.0"}, wanted)
    assert other == Check(
        "versions",
        WARN,
        "deepspeed 0.18.0 (tested: 0.19.8)",
        "pip install deepspeed==0.19.8",
    )
    assert machine.check_versions({}, {}).status == WARN
    assert "not installed" in machine.check_versions({}, {}).detail


def test_nvidia_smis_lines():
    text = "NVIDIA H100 80GB HBM3, 81559, 0\nNVIDIA GeForce RTX 3090, 24576, [N/A]\nA100, 1, 2\n"
    cards = machine.parse_gpus(text)
    assert cards[0] == H100
    assert [card.errors for card in cards] == [0, 0, 2]
    assert machine.parse_gpus("") == []


def test_gpus_without_a_cuda_build_of_torch_and_with_errors():
    import torch

    if torch.version.cuda is None:
        found = machine.check_gpus([H100] * 8, 8)
        assert found.status == FAIL
        assert f"8 x {H100.name}, but torch {torch.__version__} is a build without" in found.detail
    broken = machine.check_gpus([H100, Gpu(name="A100", memory_mib=1, errors=2)], 2)
    assert (broken.status, broken.detail) == (FAIL, "GPU 1: uncorrected memory errors")
    assert machine.check_gpus([], 2).status == OK


def test_limits():
    assert machine.check_files(1023).detail == "ulimit -n is 1023, 1024 are needed"
    assert machine.check_files(-1) == Check("open files", OK, "unlimited")
    assert network.check_locked(65536).detail.startswith("ulimit -l is 64 KiB")
    assert network.check_locked(-1).status == OK
    docker = machine.check_shared_memory(64 << 20)
    assert docker.status == FAIL and docker.detail.startswith("64 MiB")
    assert "--shm-size" in docker.remedy
    assert machine.check_shared_memory(1 << 30).status == OK
    assert machine.check_cores(4, 2) == Check(
        "cores",
        WARN,
        "4 ranks share 2 cores",
        "start fewer ranks here, or ask the scheduler for more cores a task",
    )


def test_open_files_as_the_shell_limits_them():
    line = f"ulimit -n 512; {sys.executable} -m megagpt doctor"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert rows(done.stdout)["open files"] == (FAIL, "ulimit -n is 512, 1024 are needed")


def test_gpus_of_amd_are_not_called_a_cpu(tmp_path, monkeypatch):
    for node, number in enumerate(("0", "4711", "4712")):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "gpu_id").write_text(f"{number}\n")
    assert machine.amd_gpus(tmp_path) == 2 and machine.amd_gpus(tmp_path / "none") == 0
    monkeypatch.setattr(machine, "AMD_NODES", tmp_path)
    found = machine.check_gpus([], 2)
    assert found.status == FAIL and found.detail.startswith("2 of AMD, but torch ")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = machine.check_gpus([], 2)
    assert found.status == WARN and found.detail.startswith("2 of AMD, by torch ")


# --- network ------------------------------------------------------------------------------------

DEBIAN = Network(
    host="node1",
    address="127.0.1.1",
    interfaces={"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": "10.1.0.5"},
    outward="eth0",
)


def test_this_hosts_interfaces():
    found = network.look("127.0.0.1")
    assert found.interfaces["lo"] == "127.0.0.1"
    assert found.outward == ""  # no other host is reached by loopback


@pytest.mark.parametrize(
    ("hosts", "environ", "status"),
    [
        (1, {}, OK),
        (2, {}, OK),
        (2, {"GLOO_SOCKET_IFNAME": "eth0"}, OK),
        (2, {"GLOO_SOCKET_IFNAME": "eth0,ib0"}, OK),
        (2, {"GLOO_SOCKET_IFNAME": "eth1"}, FAIL),
        (1, {"NCCL_SOCKET_IFNAME": "eth,ib"}, OK),
        (1, {"NCCL_SOCKET_IFNAME": "=eth"}, FAIL),
        (1, {"NCCL_SOCKET_IFNAME": "^lo"}, OK),
        (1, {"NCCL_SOCKET_IFNAME": "^lo,eth,ib"}, FAIL),
    ],
)
def test_the_interface_between_hosts(hosts, environ, status):
    assert network.check_interface(DEBIAN, hosts, environ).status == status


def test_a_job_to_come_is_of_several_hosts():
    def told(gpus_per_node: int) -> str:
        order = Order(ranks=32, gpus_per_node=gpus_per_node)
        return next(iter(network.check_network(order, {}))).detail

    assert "on one host" not in told(8)
    name = network.look()
    if name.address.startswith("127."):
        assert "well on one host" in told(32) and "on one host" in told(0)


def test_the_trap_of_a_name_that_means_itself():
    found = network.check_interface(DEBIAN, 2, {})
    assert found.detail == (
        "the host's own name node1 resolves to 127.0.1.1, itself; ranks take the interface of "
        "their way to rank 0"
    )
    alone = Network(host="node1", address="127.0.1.1", interfaces={"lo": "127.0.0.1"})
    assert (
        network.check_interface(alone, 2, {}).detail == "no interface but loopback has an address"
    )
    wrong = network.check_interface(DEBIAN, 2, {"GLOO_SOCKET_IFNAME": "eth1"})
    assert wrong.detail == "GLOO_SOCKET_IFNAME = 'eth1': no such interface with an address"
    assert wrong.remedy == "set it to one of lo, eth0, ib0"
    nameless = Network(host="node1", address="", interfaces=DEBIAN.interfaces)
    assert "resolves to no address" in network.check_interface(nameless, 2, {}).detail
    good = Network(host="node1", address="10.0.0.5", interfaces=DEBIAN.interfaces, outward="eth0")
    assert network.check_interface(good, 2, {}).detail == "eth0 (node1 is 10.0.0.5)"


def test_infiniband(tmp_path):
    for port, state in ((1, "4: ACTIVE"), (2, "1: DOWN")):
        folder = tmp_path / "mlx5_0" / "ports" / str(port)
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
    ports = network.infiniband_ports(tmp_path)
    assert ports == {"mlx5_0/1": "ACTIVE", "mlx5_0/2": "DOWN"}
    found = network.check_infiniband(ports, {})
    assert (found.status, found.detail) == (WARN, "mlx5_0/2 not active, of 2 ports")
    up = {"mlx5_0/1": "ACTIVE"}
    assert network.check_infiniband(up, {}).status == OK
    assert network.check_infiniband(up, {"NCCL_IB_DISABLE": "1"}).status == WARN


# --- several hosts ------------------------------------------------------------------------------


def test_what_hosts_found_alike_stands_once():
    good, bad = Check("cores", OK, "8"), Check("cores", FAIL, "1", "buy more")
    reports = [
        Report(host=f"host-{i}", checks=[bad if i in (2, 3) else good], facts={}) for i in range(8)
    ]
    assert merged(reports) == [
        Check("cores", OK, "host-0, host-1, host-4, host-5 and 2 more: 8"),
        Check("cores", FAIL, "host-2, host-3: 1", "buy more"),
    ]
    assert merged(reports[:1]) == [good]
    assert merged(reports[:2])[0].detail == "2 hosts: 8"
    # What is well may differ from host to host; several rows of a name stay several.
    shards = [
        Report(host=h, checks=[Check("shards", OK, f"train {n}"), Check("shards", OK, "rest")])
        for h, n in (("a", 1), ("b", 2))
    ]
    assert [row.detail for row in merged(shards)] == [
        "2 hosts, such as a: train 1",
        "2 hosts: rest",
    ]


def test_a_report_travels_as_json():
    report = Report(host="a", checks=[Check("x", OK, "y", "z")], facts={"code": "1"})
    assert report_of(json.loads(json.dumps(dataclasses.asdict(report)))) == report


def test_the_table():
    text = as_text([Check("x", OK, "well"), Check("longer", FAIL, "one\ntwo", "do this")])
    assert text.splitlines() == [
        "ok    x       well",
        "FAIL  longer  one",
        "              two",
        "              -> do this",
        "",
        "1 ok, 0 to know, 1 failed",
    ]


def test_hosts_that_differ():
    facts = {"the code of megagpt": "1", "torch": "2"}
    same = [Report(host=h, checks=[], facts=facts) for h in ("a", "b")]
    assert [one.status for one in check_same(same)] == [OK]
    other = Report(host="c", checks=[], facts=facts | {"torch": "3"})
    (found,) = check_same([*same, other])
    assert found.detail == "torch is not the same on all hosts: 2 on a, b; 3 on c"
    assert found.status == FAIL
    kinds = [
        Report(host=h, checks=[], facts={"GPUs": k}) for h, k in (("a", "H100"), ("b", "A100"))
    ]
    assert [one.status for one in check_same(kinds)] == [WARN]


def test_clocks():
    assert check_clocks({"a": 5.0, "b": 0.0}, "rank 0").status == WARN
    late = check_clocks({"a": -60.0, "b": 0.0}, "rank 0")
    assert (late.status, late.detail) == (FAIL, "a -60.0 s against rank 0")
    assert "chrony" in late.remedy
    assert check_clocks({"a": -0.2, "b": 0.0}, "rank 0") == Check("clocks", OK, "within 0.200 s")


def test_a_file_that_every_host_must_see(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with shared_file(Order()) as (name, content):
        path = Path(name)
        assert machine.check_shared_file(path, content).status == OK
        changed = machine.check_shared_file(path, "another")
        assert changed.status == FAIL and "other content" in changed.detail
        assert list(tmp_path.iterdir()) == [path]
    assert list(tmp_path.iterdir()) == []
    gone = machine.check_shared_file(path, content)
    assert gone.status == FAIL and "No such file or directory" in gone.detail
    assert "mount the same file system" in gone.remedy


def test_a_file_that_cannot_be_written_is_asked_of_nobody(monkeypatch):
    # Not even root may write there.
    monkeypatch.chdir("/proc")
    with shared_file(Order()) as written:
        assert written == ("", "")

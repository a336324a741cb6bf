"""Hosts that differ in anything that decides the run are named, with what differs."""

import os
import shutil

import pytest
import torch

from megagpt.cluster.agreement import (
    DRIVER,
    PACKAGE,
    code_digest,
    disagreements,
    facts_of_devices,
    facts_of_run,
)
from megagpt.config import load_run
from tests.lib.corpus import run_file


@pytest.fixture
def config(tmp_path):
    return load_run(run_file(tmp_path))


def told(before, after):
    """What differs between two hosts."""
    return disagreements(["a", "b"], [before, after])


def test_the_same_host_twice(config):
    assert told(facts_of_run(config), facts_of_run(config)) == []


def test_another_run_file(config, tmp_path):
    other = load_run(tmp_path / "run.toml", ["schedule.peak_lr=1e-3"])
    (line,) = told(facts_of_run(config), facts_of_run(other))
    assert line.startswith("the run file with its overrides is not the same on all hosts: sha256 ")


def test_drivers_and_what_torch_was_built_for(tmp_path):
    drivers = {"NVIDIA": tmp_path / "nvidia", "AMD": tmp_path / "amdgpu"}
    without = facts_of_devices(drivers)
    assert without == {DRIVER: "none"}
    drivers["NVIDIA"].write_text("580.95.05\n")
    facts = facts_of_devices(drivers)
    assert facts[DRIVER] == "NVIDIA 580.95.05"
    assert facts["CUDA or ROCm"] == str(torch.version.cuda or torch.version.hip)
    assert told(without, facts) == [
        f"{DRIVER} is not the same on all hosts: none on a; NVIDIA 580.95.05 on b"
    ]
    assert told(facts | {"NCCL": "2.27.5"}, facts | {"NCCL": "2.26.2"}) == [
        "NCCL is not the same on all hosts: 2.27.5 on a; 2.26.2 on b"
    ]


def test_a_shard_that_one_host_lacks(config, tmp_path):
    before = facts_of_run(config)
    shard = sorted((tmp_path / "train").glob("*.bin"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    (line,) = told(before, facts_of_run(config))
    assert f"{shard} has {len(content) - 2} bytes of {len(content)} on b" in line
    shard.unlink()
    (line,) = told(before, facts_of_run(config))
    assert line.startswith(f"{tmp_path}/train is not the same on all hosts: ")
    assert line.endswith(f"{shard} cannot be read (No such file or directory) on b")
    shard.write_bytes(content)
    os.rename(shard.with_suffix(".idx"), tmp_path / "elsewhere")
    (line,) = told(before, facts_of_run(config))
    assert f"{shard.with_suffix('.idx')} cannot be read (No such file" in line


def test_a_folder_that_one_host_lacks(config, tmp_path):
    before = facts_of_run(config)
    os.rename(tmp_path / "validation", tmp_path / "elsewhere")
    (line,) = told(before, facts_of_run(config))
    assert line.endswith(f"{tmp_path}/validation does not exist on b")


def test_many_hosts():
    hosts = [f"n{i // 2}" for i in range(14)]
    # One rank of a host says what holds there.
    said = [{"code": "old" if i == 6 else "new"} if i % 2 == 0 else {} for i in range(14)]
    (line,) = disagreements(hosts, said)
    assert line == "code is not the same on all hosts: new on n0, n1, n2, n4 and 2 more; old on n3"


def test_a_copy_has_the_same_digest_and_a_changed_one_has_not(tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    own = code_digest()
    assert code_digest(copy) == own
    assert len(own) == 64
    changed = copy / "plan" / "layout.py"
    changed.write_text(changed.read_text() + "\n")
    assert code_digest(copy) != own


def test_names_count_and_other_files_do_not(tmp_path):
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b.py").write_text("two")
    first = code_digest(tmp_path)
    (tmp_path / "a.pyc").write_text("compiled")
    assert code_digest(tmp_path) == first
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    assert code_digest(tmp_path) != first


def test_where_a_file_ends_counts(tmp_path):
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b.py").write_text("two")
    first = code_digest(tmp_path)
    (tmp_path / "a.py").write_text("onetw")
    (tmp_path / "b.py").write_text("o")
    assert code_digest(tmp_path) != first

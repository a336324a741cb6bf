"""Every launcher trains over two hosts to the curve of one host, bit for bit."""

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.lib.corpus import run_file
from tests.lib.distributed import exact, steps, trained
from tests.virtual.hosts import Cluster
from tests.virtual.slurm import Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

LAYOUTS = {"zero1": (), "PP2": ("parallel.ds_config=pipeline", "parallel.pipeline=2")}
"""Two ranks in either case."""
TWO_HOSTS = ("-N2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_file(tmp_path_factory.mktemp("recipe"), schedule={"total_tokens": 15 * 512})


@functools.cache
def on_one_host(file: Path, layout: str) -> list[tuple[Any, ...]]:
    """The steps of the same run on this machine."""
    return exact(trained(file, 2, f"output={file.parent}/{layout}", *LAYOUTS[layout]))


def by_pdsh(cluster: Cluster, slurm: Slurm, arguments: list[str]) -> tuple[int, str]:
    hostfile = cluster.folder / "hostfile"
    hostfile.write_text("# the cluster\nhost-a slots=1\n\nhost-b slots=1\n")
    environ = {"HOSTFILE": str(hostfile)}
    return cluster["login"].run("launch/multinode.sh", *arguments, environ=environ)


def by_deepspeed_in_a_job(cluster: Cluster, slurm: Slurm, arguments: list[str]) -> tuple[int, str]:
    log = cluster.folder / "log" / "deepspeed"
    job = slurm.submit(*TWO_HOSTS, f"--output={log}", "launch/slurm_deepspeed.sbatch", *arguments)
    state = slurm.end(job)["JobState"]
    return int(state != "COMPLETED"), log.read_text()


def by_srun(cluster: Cluster, slurm: Slurm, arguments: list[str]) -> tuple[int, str]:
    return cluster["login"].run("srun", *TWO_HOSTS, "python", "-m", "megagpt.train", *arguments)


def by_torchrun(cluster: Cluster, slurm: Slurm, arguments: list[str]) -> tuple[int, str]:
    return cluster["login"].run("srun", *TWO_HOSTS, "launch/torchrun.sh", *arguments)


@pytest.mark.parametrize("launch", [by_pdsh, by_deepspeed_in_a_job, by_srun, by_torchrun])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_hosts_train_to_the_curve_of_one(cluster, slurm, file, layout, launch, tmp_path):
    arguments = [str(file), f"output={tmp_path}/run", *LAYOUTS[layout]]
    code, said = launch(cluster, slurm, arguments)
    assert code == 0, said
    assert "run complete" in said
    assert exact(steps(tmp_path / "run")) == on_one_host(file, layout)

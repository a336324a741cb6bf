"""launch/multinode.sh --until-done, unattended: what ends a start, and what ends it for good."""

import os
import signal
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints
from tests.virtual.hosts import Cluster, wait_until
from tests.virtual.test_faults import ENDLESS, ranks, start
from tests.virtual.test_late import hostfile
from tests.virtual.test_slurm import is_the_calm_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def until_done(cluster: Cluster, file: Path, *words: str):
    environ = {"HOSTFILE": str(hostfile(file.parent)), "PAUSE": "1", "RETRIES": "0"}
    return start(cluster, "launch/multinode.sh", "--until-done", str(file), *words, **environ)


def said(cluster: Cluster) -> str:
    return (cluster.folder / "log" / "started").read_text()


def test_a_rank_that_dies_and_a_host_that_is_gone_for_a_while(cluster, file):
    script = until_done(cluster, file)
    wait_until(lambda: list_checkpoints(file.parent / "run"), "a checkpoint")
    (rank,) = cluster["host-b"].ranks()
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: "a start ended with code 247" in said(cluster), "the start ends")
    with cluster["host-b"].unplugged():
        # No start of those that are counted.
        wait_until(lambda: said(cluster).count("host-b of ") > 1, "the host is missed twice")
    assert script.wait() == 0, said(cluster)
    is_the_calm_run(file.parent / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_ranks_start_leaves_none(cluster, file, number):
    script = until_done(cluster, file, *ENDLESS)
    wait_until(lambda: len(ranks(cluster)) == 2, "the ranks start")
    (own, *_) = cluster["login"].processes("bash launch/multinode.sh --until-done")
    os.kill(own, number)
    assert script.wait() == 137, said(cluster)
    wait_until(lambda: not ranks(cluster), "no rank is left")
    assert said(cluster).count("a start ended with code") == 1
    assert not list_checkpoints(file.parent / "run")


def test_a_host_that_was_never_there_ends_it(cluster, file):
    with cluster["host-b"].unplugged():
        script = until_done(cluster, file)
        assert script.wait() == 2
    assert said(cluster).count("ssh does not reach it") == 1

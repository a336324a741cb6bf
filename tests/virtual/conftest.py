"""One cluster for all tests here: a login host, two compute hosts with SLURM, and a spare one."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.corpus import run_file
from tests.lib.distributed import EXACT, launch
from tests.virtual.hosts import Cluster, Host, missing, virtual_hosts, wait_until
from tests.virtual.slurm import Slurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The hosts, in a folder whose name is short: those of sockets end after 108 characters."""
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    try:
        with virtual_hosts(folder, "login", "host-a", "host-b", "host-c") as made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm(cluster: Cluster) -> Slurm:
    """SLURM on the hosts."""
    return Slurm(cluster)


@pytest.fixture(scope="session")
def undisturbed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file, beside `calm/`, the run that nothing disturbed, on one host."""
    root = tmp_path_factory.mktemp("calm")
    made = run_file(root, **EXACT, schedule={"total_tokens": 60 * 1024})
    done = launch(made, 2, f"output={root}/calm", timeout_s=600)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def file(undisturbed_file: Path, tmp_path: Path) -> Path:
    """The same run in a folder of its own."""
    root, own = undisturbed_file.parent, tmp_path / "run.toml"
    there = f'output = "{root}/run"'
    text = undisturbed_file.read_text()
    assert there in text
    own.write_text(text.replace(there, f'output = "{tmp_path}/run"'))
    (tmp_path / "calm").symlink_to(root / "calm")
    return own


@pytest.fixture
def spare(slurm: Slurm) -> Iterator[Host]:
    """A third compute host, which SLURM has for this test alone."""
    slurm.start_node(slurm.spare)
    try:
        yield slurm.spare
    finally:
        slurm.stop_node(slurm.spare)


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[None]:
    """No test may leave a rank or a launcher behind on any host."""
    yield
    if "slurm" in request.fixturenames:
        # After a test that failed; the others left an empty queue.
        request.getfixturevalue("slurm").login.check("scancel --user=root")
    try:
        wait_until(lambda: not cluster.ranks(), "all ranks and launchers have ended")
    finally:
        for process in sum(cluster.ranks().values(), []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

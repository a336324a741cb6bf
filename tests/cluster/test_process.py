"""What is set for the whole process: the device of a rank, and memory that is kept when freed."""

import json
import platform

import pytest

from megagpt.cluster.process import keep_freed_memory, set_device
from megagpt.cluster.ranks import Ranks
from tests.lib.distributed import python

FAULTS = """
import resource, torch
from megagpt.cluster.process import keep_freed_memory
assert not {keep} or keep_freed_memory()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large, small = torch.ones(1 << 24), [torch.ones(1 << 16) for _ in range(256)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([step() for _ in range(6)])
"""
HUGE_PAGES = 32


LAST = """
import atexit, os, sys
import megagpt.cluster.process as process
from megagpt.cluster.ranks import discover
atexit.register(print, "kept for the end")
if {joined}:
    ranks = discover(os.environ)
    process.prepare_environment(ranks, os.environ)
    process.join(ranks)
    import torch.distributed as dist
    # Destroyed late, it would end the process by a signal now and then.
    kept = dist.group.WORLD
    process.leave()
print("said")
atexit.register(lambda: print("first of all"))
class Torn:
    def __del__(self):
        print("torn down")
torn = Torn()
process.end(7)
"""


@pytest.mark.parametrize("joined", [False, True])
def test_a_process_ends_with_its_code_and_a_rank_without_the_teardown(joined):
    done = python(LAST.format(joined=joined))
    assert done.returncode == 7, done.stderr
    told = ["said", "first of all", "kept for the end"]
    assert done.stdout.splitlines() == told + ["torn down"] * (not joined)


def faults(keep: bool) -> list[int]:
    """Page faults of each of six allocations of 128 MiB."""
    done = python(FAULTS.format(keep=keep))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_taken_again_without_page_faults():
    # Thousands of 4 KiB, or these of 2 MiB from a kernel that gives huge pages to all.
    assert faults(keep=False)[1] >= HUGE_PAGES
    # The first ones make room for all sizes.
    first, *_, last = faults(keep=True)
    assert first >= HUGE_PAGES > 2 * last


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


# --- the device of a rank -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_gpus", "environ", "expected"),
    [
        (8, {}, {"LOCAL_RANK": "3"}),
        # SLURM's --gpus-per-task=1: each rank sees one GPU, its own.
        (1, {"LOCAL_RANK": "3"}, {"LOCAL_RANK": "0"}),
        (2, {"LOCAL_RANK": "3"}, {"LOCAL_RANK": "1"}),
        (0, {"LOCAL_RANK": "3"}, {"LOCAL_RANK": "3", "DS_ACCELERATOR": "cpu"}),
        (0, {"DS_ACCELERATOR": "xpu"}, {"DS_ACCELERATOR": "xpu"}),
    ],
)
def test_a_rank_is_bound_to_a_gpu_that_it_sees(n_gpus, environ, expected):
    set_device(Ranks(rank=3, world=8, local_rank=3, local_world=8), n_gpus, environ)
    assert environ == expected


ONE_GPU = """
import os, sys
from importlib.abc import MetaPathFinder
import torch
from megagpt.cluster.process import join, prepare_environment
from megagpt.cluster.ranks import Ranks
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.set_device = lambda device: print("bound to", device)
class AtImport(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "deepspeed":
            print("imported with", os.environ["LOCAL_RANK"], flush=True)
            os._exit(0)
sys.meta_path.insert(0, AtImport())
ranks = Ranks(rank=0, world=1, local_rank=3, local_world=4)
prepare_environment(ranks, os.environ)
join(ranks)
"""


def test_deepspeed_is_imported_with_the_rank_of_the_visible_gpu():
    done = python(ONE_GPU)
    assert done.stdout.splitlines() == ["bound to 0", "imported with 0"], done.stderr

"""Memory that a step frees and the next one takes again, as the kernel counts its page faults."""

import json
import platform
import subprocess
import sys

import pytest

from megagpt.engine.malloc import keep_freed_memory

FAULTS = """
import resource, torch
from megagpt.engine.malloc import keep_freed_memory
assert not {keep} or keep_freed_memory()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large, small = torch.ones(1 << 24), [torch.ones(1 << 16) for _ in range(256)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([step() for _ in range(6)])
"""
HUGE_PAGES = 32


def faults(keep: bool) -> list[int]:
    """Page faults of each of six allocations of 128 MiB."""
    code = FAULTS.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
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

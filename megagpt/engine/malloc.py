"""On a CPU the memory that a step frees is kept for the next one (L2).

glibc takes every large tensor from the kernel anew and gives it back when it is freed, and trims
what lies at the heap's end. A training step frees all of its activations, so each step the kernel
zeroes gigabytes, page by page: a tenth of the time of a step (docs/benchmarks/model_step.md).
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees for its next allocations; False without glibc.

    The highest memory of a training process stays within a few percent of what it was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Nothing from mmap, whatever its size, and the heap's end is never given back.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))

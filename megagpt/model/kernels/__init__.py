"""The kernels of attention and loss, and what those for CUDA need on a host."""

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


@functools.cache
def missing_for_triton() -> str:
    """What Triton's kernels would lack on this host; empty when nothing is missing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    # Triton builds the C code that starts its kernels when they first run.
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return f"a C compiler ({' or '.join(names)})"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_path("include", scheme), "Python.h").exists():
        return "Python.h (a package such as python3-dev)"
    return ""

"""torch.compile where there is a compiler, one warning where there is none (L2)."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Sequence

import torch
from torch import nn

log = logging.getLogger(__name__)


def missing_compiler(device: str) -> str:
    """What torch.compile would lack on this kind of device; empty when nothing is missing."""
    if device == "cuda":
        return "" if importlib.util.find_spec("triton") else "the package triton"
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return "" if any(map(shutil.which, names)) else f"a C++ compiler ({' or '.join(names)})"


def compile_modules(modules: Sequence[nn.Module], device: torch.device, first: bool) -> None:
    """Compiles each module in place, so that its parameters keep their names.

    `first` is true on the rank that warns. Nothing is compiled before the first batch.
    """
    lacking = missing_compiler(device.type)
    if lacking:
        if first:
            log.warning(
                "parallel.compile = true, but this host has not %s that torch.compile needs; "
                "going on without compiling",
                lacking,
            )
        return
    if device.type == "cpu":
        import torch._functorch.config as functorch

        # Norms and GELU are computed again in the backward pass, where they fuse with what is
        # computed there anyway, and their results are not kept: a tenth of the memory of a step
        # at 125M and no time (docs/benchmarks/model_step.md). Not measured on a GPU.
        functorch.ban_recompute_materialized_backward = False
    for module in modules:
        module.compile()

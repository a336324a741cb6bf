"""torch.compile where there is a compiler (L2); megagpt.engine.device decides what is compiled."""

import importlib
import os
import shutil
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from megagpt.model.gpt import Block
from megagpt.model.kernels import missing_for_triton
from megagpt.model.kernels.attention import COMPILATIONS


def missing_compiler(device: str) -> str:
    """What torch.compile would lack on this kind of device; empty when nothing is missing."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "Dynamo (TORCHDYNAMO_DISABLE=1 is set)"
    if device == "cuda":
        return missing_for_triton()
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return "" if any(map(shutil.which, names)) else f"a C++ compiler ({' or '.join(names)})"


class _NoDynamo(ModuleType):
    """Stands for torch._dynamo where it is disabled: what torch's optimizers and process groups ask
    of it, without the import, which is a third of a small run's start."""

    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)

    @staticmethod
    def disable(function: Any = None, *_: object, **__: object) -> Any:
        """The function, which nothing traces, or a decorator."""
        return function or (lambda decorated: decorated)

    @staticmethod
    def graph_break() -> None:
        """There is no graph."""

    def __getattr__(self, name: str) -> Any:
        # Whoever wants more gets the real one.
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def spare_compiler() -> None:
    """Has a process whose Dynamo is disabled go without importing it."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1" and "torch._dynamo" not in sys.modules:
        sys.modules["torch._dynamo"] = torch._dynamo = _NoDynamo("torch._dynamo")


def compile_model(model: nn.Module, mode: str, whole_graphs: bool = True) -> None:
    """Compiles a model in place, so that its parameters keep their names.

    `mode`: no, blocks or model, as megagpt.engine.device chooses. `whole_graphs` is False where
    something inside a block cannot be traced. Nothing is compiled before the first batch.
    """
    if mode == "no":
        return
    import torch._dynamo.config as dynamo

    # A graph serves one shape: every micro-batch size, with and without gradients, is compiled
    # once. Beyond the limit Dynamo would go on uncompiled without a word.
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILATIONS)
    dynamo.fail_on_recompile_limit_hit = True
    if mode == "blocks":
        for block in model.modules():
            if isinstance(block, Block):
                compute = torch.compile(block.compute, dynamic=False, fullgraph=whole_graphs)
                block.compute = compute  # type: ignore[method-assign]
        return
    import torch._functorch.config as functorch

    # Norms and GELU are computed again in the backward pass, where they fuse with what is computed
    # there anyway, and their results are not kept: a tenth of the memory of a step at 125M and no
    # time (docs/benchmarks/model_step.md).
    functorch.ban_recompute_materialized_backward = False
    model.compile()

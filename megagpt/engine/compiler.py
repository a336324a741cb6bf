"""torch.compile where there is a compiler (L2); megagpt.engine.device decides what is compiled."""

import os
import shutil

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

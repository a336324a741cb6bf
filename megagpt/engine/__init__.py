"""The engines: one front over DeepSpeed for every layout (L2)."""

import contextlib
import io
import logging
from typing import Any

import torch

from megagpt.cluster.ranks import Ranks
from megagpt.config import RunConfig
from megagpt.engine.engine import Engine, SkipUpdate, StepResult
from megagpt.errors import UsageError
from megagpt.plan.layout import Layout

__all__ = ["Engine", "SkipUpdate", "Ranks", "StepResult", "build_engine"]

log = logging.getLogger(__name__)


def build_engine(
    config: RunConfig, layout: Layout, ranks: Ranks, ds_config: dict[str, Any]
) -> Engine:
    """The engine for a layout, with initial weights; every rank calls it, in a process group.

    Raises UsageError for fp16 without a GPU, which DeepSpeed refuses.
    """
    if config.parallel.dtype == "fp16" and not torch.cuda.is_available():
        raise UsageError(
            "parallel.dtype = 'fp16': needs a GPU; use bf16 (or fp32) on a machine without one"
        )
    # DeepSpeed prints what memory it takes, and stdout is for results.
    with contextlib.redirect_stdout(_Debug()):
        if layout.pipelined:
            from megagpt.engine.pipeline import PipelineEngine

            return PipelineEngine(config, layout, ranks, ds_config)
        from megagpt.engine.zero import ZeroEngine

        return ZeroEngine(config, layout, ranks, ds_config)


class _Debug(io.TextIOBase):
    """Passes what is printed to the log, for those who ask for all of it."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                log.debug("%s", line)
        return len(text)

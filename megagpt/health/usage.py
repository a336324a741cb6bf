"""How well a rank's hardware is used: speed against its peak, and memory (L2)."""

import os
from pathlib import Path

import torch

from megagpt.config import RunConfig
from megagpt.config.flops import flops_per_token
from megagpt.plan.layout import Layout


class Speed:
    """Rates of a run's steps; `peak_tflops` is that of one rank's device, None: not known."""

    def __init__(self, config: RunConfig, layout: Layout, peak_tflops: float | None) -> None:
        parallel = config.parallel
        # A pipeline recomputes its blocks k at a time, but every one of them.
        every = 1 if layout.pipelined else parallel.recompute_every
        self.model_flops = flops_per_token(config.model)
        self.hardware_flops = flops_per_token(
            config.model, recompute=parallel.recompute, recompute_every=every
        )
        self.world, self.peak_tflops = layout.world, peak_tflops

    def record(self, batch_tokens: int, step_s: float) -> dict[str, float]:
        """tokens_per_s over all ranks, step_s, tflops_per_rank; mfu and hfu where there is a peak.

        mfu counts the model's mathematics, hfu what is computed again as well
        (megagpt.config.flops).
        """
        per_rank = batch_tokens / step_s / self.world / 1e12
        found = {
            "tokens_per_s": batch_tokens / step_s,
            "step_s": step_s,
            "tflops_per_rank": self.model_flops * per_rank,
        }
        if self.peak_tflops is not None:
            found["mfu"] = self.model_flops * per_rank / self.peak_tflops
            found["hfu"] = self.hardware_flops * per_rank / self.peak_tflops
        return found


_STATM = Path("/proc/self/statm")


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of this rank: on its GPU, and resident on the host where the system tells.

    allocated: in tensors as the step ends; peak: at most in tensors since reset_peak_memory;
    reserved: taken from the GPU by torch.
    """
    found = {}
    if device.type == "cuda":
        found["memory_allocated_bytes"] = torch.cuda.memory_allocated(device)
        found["memory_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["memory_reserved_bytes"] = torch.cuda.memory_reserved(device)
    if _STATM.exists():
        pages = int(_STATM.read_text().split()[1])
        found["host_memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
    return found


def reset_peak_memory(device: torch.device) -> None:
    """From here on the peak counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

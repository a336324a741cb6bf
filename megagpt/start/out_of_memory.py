"""A device that is full: told in a sentence with the keys to turn, not in a traceback (L3)."""

import torch

from megagpt.config import RunConfig
from megagpt.errors import MegagptError
from megagpt.plan.layout import Layout

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "alloc failed")
"""What CUDA, its libraries and torch's allocator for CPUs say."""
_SHARES = {"zero0": "nothing", "zero1": "optimizer", "zero2": "gradients", "zero3": "weights"}
"""What each configuration shares out over the data ranks, beside what those before it do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this host, had no memory left for what torch asked."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def out_of_memory(config: RunConfig, layout: Layout, rank: int, error: BaseException) -> Exception:
    """The error to raise instead: where it was, and what helps, the cheapest first."""
    asked = str(error).strip().splitlines()[0]
    where = f"rank {rank} of {layout.world}"
    if torch.cuda.is_available():
        free, size = torch.cuda.mem_get_info()
        where += f", {(size - free) / 2**30:.1f} of {size / 2**30:.1f} GiB of its GPU in use"
    lines = "\n".join(f"  - {step}" for step in _remedies(config, layout))
    search = f"megagpt plan RUN.toml --gpus {layout.world} --search"
    return MegagptError(
        f"out of memory ({where}): {asked}\nTurn one of these, the cheapest first; none changes "
        f"what the run learns, and it goes on from its last checkpoint:\n{lines}\n"
        f"`{search}` lists layouts that fit"
    )


def _remedies(config: RunConfig, layout: Layout) -> list[str]:
    """Keys and values for this run, without those that it has already."""
    parallel, found = config.parallel, []
    if parallel.micro_batch > 1:
        half = parallel.micro_batch // 2
        found.append(f"parallel.micro_batch = {half} (now {parallel.micro_batch})")
    if parallel.recompute == "none":
        found.append('parallel.recompute = "full": blocks are computed again, a third more work')
    if not layout.pipelined and layout.data > 1 and parallel.ds_config in _SHARES:
        names = list(_SHARES)
        for name in names[names.index(parallel.ds_config) + 1 :]:
            shared = f"{_SHARES[name]} shared by the {layout.data} data ranks"
            found.append(f'parallel.ds_config = "{name}": {shared}')
    if not layout.pipelined and "offload" not in parallel.ds_config:
        found.append(
            'parallel.ds_config = "zero3_offload": the optimizer in the memory of the host'
        )
    found.append("more GPUs, with parallel.tensor or parallel.pipeline for a large model")
    return found

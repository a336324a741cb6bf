"""A short all-reduce over all ranks, and a matrix product on each: right, and how fast?"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from megagpt.check.findings import OK, WARN, Check, names
from megagpt.errors import MegagptError

REPEATS = 5
SLOW_GBPS = 1.0
"""10^9 bytes/s of a bus between GPUs below which something is wrong with the network."""
STRAGGLER = 0.8
"""A rank below this part of the median speed holds all others up."""


def measure(rank: int, world: int) -> dict[str, float]:
    """All ranks call it, in a process group. Median seconds of an all-reduce, its bytes, FLOP/s.

    Raises MegagptError when the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    # Whole numbers below 2^24 add up exactly in fp32, in any order.
    data = torch.empty((1 << 26) if gpu else (1 << 22), dtype=torch.float32, device=device)
    expected = world * (world + 1) // 2
    seconds = []
    for _ in range(REPEATS + 1):
        data.fill_(rank + 1)
        dist.barrier()
        t0 = time.perf_counter()
        dist.all_reduce(data)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - t0)
        wrong = int((data != expected).sum())
        if wrong:
            raise MegagptError(
                f"rank {rank}: {wrong} of {data.numel()} sums are not {expected}: data changes on "
                "the way"
            )
    # The first one opens the connections.
    return {
        "seconds": statistics.median(seconds[1:]),
        "bytes": float(data.numel() * data.element_size()),
        "flops": _matrix_flops(device) if gpu else 0.0,
    }


def _matrix_flops(device: Any) -> float:
    """FLOP/s of a GPU's matrix product, where the tensor cores are busy."""
    import torch

    size, turns = 8192, 20
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    for _ in range(turns):
        a @ a
    torch.cuda.synchronize()
    return 2.0 * size**3 * turns / (time.perf_counter() - t0)


def check_all_reduce(seconds: float, size: float, world: int, gpus: bool) -> Check:
    """What the all-reduce tells of the network. size: bytes summed on each rank."""
    # Each rank sends and receives 2 (n - 1) / n of its data, whatever the algorithm.
    bus = 2 * (world - 1) / world * size / seconds / 1e9
    text = (
        f"{world} ranks sum {size / 2**20:.0f} MiB in {1e3 * seconds:.1f} ms: {bus:.3g} GB/s "
        "bus bandwidth"
    )
    if gpus and bus < SLOW_GBPS:
        remedy = "run with NCCL_DEBUG=INFO: does it take InfiniBand, NVLink, the right interface?"
        return Check("all-reduce", WARN, text, remedy)
    return Check("all-reduce", OK, text)


def check_speeds(flops: Sequence[float], hosts: Sequence[str]) -> Check:
    """Whether a rank's GPU is slower than the others'; flops and hosts by rank."""
    median = statistics.median(flops)
    slow = [f"rank {r} on {hosts[r]}" for r, f in enumerate(flops) if f < STRAGGLER * median]
    text = f"{min(flops) / 1e12:.0f} to {max(flops) / 1e12:.0f} TFLOP/s of matrix products"
    if slow:
        remedy = "look at power, temperature and clocks with nvidia-smi -q; drain what stays slow"
        return Check("GPU speed", WARN, f"{text}; slow: {names(slow)}", remedy)
    return Check("GPU speed", OK, text)

"""The loss's softmax on CUDA: one Triton kernel over a chunk of logits.

Letters: N positions of the chunk, R rows of the output matrix.

A logit costs 4 bytes of device memory in bf16: it is read once for its row's maximum and sum, a
second time from the L2 cache, and overwritten by its gradient. A row belongs to one program and
is summed in a fixed order, without atomics, so every run gives the same bits. torch's own
operators take 58 bytes, the same written for Inductor 6.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

BLOCK = 4096
"""Columns at a time: 16 for each of a program's 256 threads."""


@triton.jit
def _softmax_rows(logits, targets, log_mass, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.program_id(0)
    row = logits + position.to(tl.int64) * stride
    target = tl.load(targets + position).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    # 1) Maximum and sum of exponentials in one pass (Milakov and Gimelshein 2018), lane by lane.
    top = tl.full((BLOCK,), -1e38, tl.float32)  # finite: -inf - -inf is no number
    mass = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, ROWS, BLOCK):
        column = first + lane
        x = tl.load(row + column, mask=column < ROWS, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        mass = mass * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    peak = tl.max(top, 0)
    total = tl.sum(mass * tl.exp(top - peak), 0)
    tl.store(log_mass + position, peak + tl.log(total))
    # 2) The gradient of the loss takes the logits' memory; padding is -inf and gets 0.
    scale = tl.where(target >= 0, 1.0, 0.0)
    for first in range(0, ROWS, BLOCK):
        column = first + lane
        x = tl.load(row + column, mask=column < ROWS, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - peak) / total - tl.where(column == target, 1.0, 0.0)
        tl.store(row + column, (gradient * scale).to(logits.dtype.element_ty), mask=column < ROWS)


@library.custom_op("megagpt::softmax_gradient", mutates_args=("logits",))
def softmax_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Overwrites logits (N, R) by softmax - onehot(targets), 0 where a target is negative.

    Returns the logarithm of each row's sum of exponentials: (N,) fp32.
    """
    assert logits.stride(1) == 1, "the rows of a chunk of logits lie one after another"
    log_mass = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _softmax_rows[(len(logits),)](
        logits,
        targets.contiguous(),
        log_mass,
        logits.stride(0),
        logits.shape[1],
        BLOCK,
        num_warps=8,
    )
    return log_mass


@softmax_gradient.register_fake
def _(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)

"""Causal attention on a CPU in bf16, tile by tile, on plain batched matrix products.

Letters: B batch, T positions, H heads, E width of a head, W band width, N = B H.

Only for CPUs that multiply bf16 by themselves (AVX512-BF16). torch's CPU flash kernel reaches about
a quarter of the speed of a matrix product there; this form, with its scores rounded to bf16 as an
unfused attention has them, about 1.3 times the flash kernel's. That costs accuracy: two to ten
times the flash kernel's error of the output (docs/benchmarks/model_step.md). A tile of TILE queries
meets only the keys that one of them may see, so a band costs O(T W), and nothing of size T x T is
kept: the backward pass computes the weights again. Two custom operators, so that torch.compile
takes it as it is.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, library

TILE = 128
"""Queries at a time: 64 to 512 were tried, 128 was fastest."""


def attend_tiled(q: Tensor, k: Tensor, v: Tensor, band: int | None) -> Tensor:
    """Causal attention of (B, H, T, E) on themselves; `band` is W, or None for dense."""
    return _forward(q, k, v, q.shape[2] if band is None else band)


@library.custom_op("megagpt::tiled_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, band: int) -> Tensor:
    # (B, T, H, E) in memory, so that the heads are joined again without a copy.
    b, h, t, e = q.shape
    out = q.new_empty(b, t, h, e).transpose(1, 2)
    q, k, v = _flat(q) * (1.0 / math.sqrt(e)), _turned(k), _flat(v)
    for low, first, last in _tiles(t, band):
        weights = _weights(q, k, low, first, last, band)
        out[:, :, first:last] = torch.bmm(weights, v[:, low:last]).view(b, h, last - first, e)
    return out


@library.custom_op("megagpt::tiled_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, band: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, t, e = q.shape
    scale = 1.0 / math.sqrt(e)
    q, k_turned, v_turned = _flat(q) * scale, _turned(k), _turned(v)
    k, grad = _flat(k), _flat(grad)
    # sum_j weight_ij dweight_ij = grad_i . out_i (Dao et al. 2022, appendix B.2)
    inner = (grad * _flat(out)).sum(2, keepdim=True)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(k)
    for low, first, last in _tiles(t, band):
        weights = _weights(q, k_turned, low, first, last, band)
        some_q, some_grad = q[:, first:last], grad[:, first:last]
        grad_v[:, low:last].baddbmm_(weights.transpose(1, 2), some_grad)
        scores = torch.bmm(some_grad, v_turned[:, :, low:last])
        scores.sub_(inner[:, first:last]).mul_(weights)
        grad_q[:, first:last] = torch.bmm(scores, k[:, low:last])
        grad_k[:, low:last].baddbmm_(scores.transpose(1, 2), some_q)
    grad_q.mul_(scale)
    return grad_q.view(b, h, t, e), grad_k.view(b, h, t, e), grad_v.view(b, h, t, e)


def _flat(x: Tensor) -> Tensor:
    """(B, H, T, E) -> (N, T, E), contiguous."""
    return x.reshape(-1, x.shape[2], x.shape[3])


def _turned(x: Tensor) -> Tensor:
    """(B, H, T, E) -> (N, E, T), contiguous: a slice of its positions multiplies without a copy."""
    return x.transpose(2, 3).flatten(0, 1).contiguous()


def _tiles(t: int, band: int) -> Iterator[tuple[int, int, int]]:
    """(first key, first query, end of both) of each tile."""
    for first in range(0, t, TILE):
        yield max(0, first - band + 1), first, min(first + TILE, t)


def _weights(q: Tensor, k: Tensor, low: int, first: int, last: int, band: int) -> Tensor:
    """Softmax of the scores of queries first..last on keys low..last: (N, queries, keys).

    q (N, T, E), k (N, E, T).
    """
    scores = torch.bmm(q[:, first:last], k[:, :, low:last])
    # Only the last keys can lie in a query's future, and only the first ones behind its band.
    n = last - first
    scores[:, :, first - low :].add_(q.new_full((n, n), float("-inf")).triu_(1))
    if last - low > band:
        behind = last - low - band
        rows = torch.arange(first, last, device=q.device)[:, None]
        keys = torch.arange(low, low + behind, device=q.device)[None, :]
        scores[:, :, :behind].masked_fill_(rows - keys >= band, float("-inf"))
    return scores.softmax(2)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, band: int) -> Tensor:
    b, h, t, e = q.shape
    return q.new_empty(b, t, h, e).transpose(1, 2)


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, band: int) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.band = inputs
    ctx.save_for_backward(*tensors, output)


def _chain(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out = ctx.saved_tensors
    return *_backward(q, k, v, out, grad, ctx.band), None


_forward.register_autograd(_chain, setup_context=_setup)

"""Causal attention, dense and locally banded, and the forms that compute it.

Letters: B batch, T queries, S keys, H heads of this rank, E width of a head, W band width.

A banded query i sees the W keys i - W + 1 .. i, itself included (Sparse Transformer's `local`).
Dense: scaled_dot_product_attention. Banded: on CUDA flex_attention with a block mask, elsewhere
scaled_dot_product_attention over blocks of W queries with 2 W keys each; both cost O(T W) time
and memory. A CPU in bf16 has a faster form for both (`megagpt.model.kernels.attention_cpu`).
`attention_form` decides, for the model and for the line in the log alike.
`attend_slowly` is the mask written out, which the tests hold the others against.
As in GPT-3, documents of one window are not masked from each other (order/windows.py).
Another pattern is named in ModelConfig.attention, chosen by layer in GPT's Attention, and gets
its mask here, in `attend_slowly` first.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.model.kernels import missing_for_triton
from megagpt.model.kernels.attention_cpu import attend_tiled

COMPILATIONS = 64
"""Shapes that flex_attention may be compiled for in one process."""


FLEX_WIDTH = 16
"""Narrowest heads that flex_attention's kernel takes."""


def attention_form(
    device: str, dtype: torch.dtype, banded: bool, dropout: float, width: int
) -> str:
    """Which form computes attention in training on this type of device.

    tiles: this package's own for CPUs; flex: flex_attention; sdpa: scaled_dot_product_attention;
    blocks: the same over blocks of a band. `width` is that of a head.
    """
    if _takes_tiles(device, dtype, dropout):
        return "tiles"
    if not banded:
        return "sdpa"
    # flex_attention has no dropout.
    flex = device == "cuda" and dropout == 0.0 and width >= FLEX_WIDTH and _flex_fuses()
    return "flex" if flex else "blocks"


BF16_PRODUCTS = bool(torch.cpu._is_avx512_bf16_supported())
"""Whether this CPU multiplies bf16 by itself. Where it does not, the tiles take twice the time of
torch's flash kernel; they have two to ten times its rounding anywhere."""


def _takes_tiles(device: str, dtype: torch.dtype, dropout: float) -> bool:
    return BF16_PRODUCTS and device == "cpu" and dtype == torch.bfloat16 and dropout == 0.0


@cache
def _flex_fuses() -> bool:
    """Whether flex_attention is one kernel here: it needs Triton, and Dynamo switched on."""
    return os.environ.get("TORCHDYNAMO_DISABLE") != "1" and not missing_for_triton()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: int | None = None,
    dropout: float = 0.0,
    mask: Any = None,
) -> Tensor:
    """Causal attention of queries q (B, H, T, E) over k, v (B, H, S, E), T <= S: (B, H, T, E).

    The queries are the last T of the S positions, so that a KV cache may hold the earlier ones.
    `band` is W, or None for dense. `dropout` acts on the attention weights; pass 0 to evaluate.
    `mask` is the band's block mask where flex_attention is to compute it.
    """
    t, s = q.shape[2], k.shape[2]
    # Not attention_form: this is traced with a block, and that may look for files.
    if t == s > 1 and _takes_tiles(q.device.type, q.dtype, dropout):
        return attend_tiled(q, k, v, band)
    if band is None or s <= band:  # the band holds every key: dense
        return _dense(q, k, v, dropout)
    if t < s:
        return _decode(q, k, v, band, dropout)
    if mask is not None:
        return _flex(q, k, v, mask)
    return _blocked(q, k, v, band, dropout)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """CUDA: one fused kernel that skips the blocks outside the band."""
    from torch.nn.attention.flex_attention import flex_attention

    # Never without the compiler: by itself flex_attention writes out T x T scores in fp32.
    compiling = torch.compiler.is_compiling()
    return (flex_attention if compiling else _compiled_flex())(q, k, v, block_mask=mask)


def attend_slowly(q: Tensor, k: Tensor, v: Tensor, band: int | None = None) -> Tensor:
    """The reference: the same function as `attend`, in O(T S) with the mask written out."""
    t, s = q.shape[2], k.shape[2]
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    scores = scores.masked_fill(~visible(t, s, band, q.device), float("-inf"))
    return scores.softmax(-1) @ v


def visible(t: int, s: int, band: int | None, device: torch.device) -> Tensor:
    """Which of s keys each of the last t positions sees: (T, S) bool."""
    query = torch.arange(s - t, s, device=device)[:, None]
    key = torch.arange(s, device=device)[None, :]
    seen = key <= query
    return seen if band is None else seen & (query - key < band)


def _dense(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    t, s = q.shape[2], k.shape[2]
    if t == s or t == 1:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=t == s > 1)
    mask = visible(t, s, None, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _decode(q: Tensor, k: Tensor, v: Tensor, band: int, dropout: float) -> Tensor:
    """A few queries after a cache: drop the keys that none of them sees, then mask."""
    t = q.shape[2]
    s = min(k.shape[2], t + band - 1)
    k, v = k[:, :, -s:], v[:, :, -s:]
    mask = visible(t, s, band, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _blocked(q: Tensor, k: Tensor, v: Tensor, band: int, dropout: float) -> Tensor:
    """Blocks of W queries; block n sees the keys of blocks n - 1 and n, under one mask.

    The first block has no block before it and is plain causal attention.
    """
    t = q.shape[2]
    first = F.scaled_dot_product_attention(
        q[:, :, :band], k[:, :, :band], v[:, :, :band], dropout_p=dropout, is_causal=True
    )
    # Keys are padded to whole blocks; only padded queries, dropped below, would see padding.
    blocks = -(-t // band)
    q, k, v = (F.pad(x, (0, 0, 0, blocks * band - t)) for x in (q, k, v))
    mask = visible(band, 2 * band, band, q.device)
    rest = F.scaled_dot_product_attention(
        _fold(q[:, :, band:], band),
        torch.cat([_fold(k[:, :, :-band], band), _fold(k[:, :, band:], band)], 2),
        torch.cat([_fold(v[:, :, :-band], band), _fold(v[:, :, band:], band)], 2),
        attn_mask=mask,
        dropout_p=dropout,
    )
    b, h, _, e = q.shape
    rest = rest.view(b, blocks - 1, h, band, e).transpose(1, 2).reshape(b, h, -1, e)
    return torch.cat([first, rest[:, :, : t - band]], 2)


def _fold(x: Tensor, band: int) -> Tensor:
    """(B, H, n W, E) -> (B n, H, W, E): each block becomes a row of the batch."""
    b, h, t, e = x.shape
    return x.view(b, h, t // band, band, e).transpose(1, 2).reshape(-1, h, band, e)


@cache
def _compiled_flex() -> Any:
    import torch._dynamo.config
    from torch.nn.attention.flex_attention import flex_attention

    # Every batch size is a compilation of its own. Beyond the limit Dynamo would fall back to
    # T x T scores without a word; with fullgraph it raises instead.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, COMPILATIONS)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def make_block_mask(t: int, band: int, device: torch.device) -> Any:
    """flex_attention's block mask of T positions on themselves, for any batch and heads."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(_seen(band), None, None, t, t, device=str(device))


@cache
def _seen(band: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """One function for each width: compiled code is shared by the layers that share it."""

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < band)

    return seen

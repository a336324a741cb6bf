"""Which part of a matrix a tensor-parallel rank holds: pure functions on whole tensors (L2).

The kinds follow Megatron-LM (Shoeybi et al. 2019): a column-parallel linear splits its outputs,
a row-parallel linear its inputs, the embedding its vocabulary. c_attn's outputs are q, k and v one
after another, and each rank holds its heads of all three.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("whole", "column", "qkv", "row")


def whole_shape(shape: Sequence[int], kind: str, parts: int) -> tuple[int, ...]:
    """Shape of the whole parameter of which a rank's part has `shape`."""
    sizes = list(shape)
    if kind in ("column", "qkv"):
        sizes[0] *= parts
    elif kind == "row":
        sizes[1] *= parts
    return tuple(sizes)


def take(full: Tensor, kind: str, part: int, parts: int) -> Tensor:
    """Part `part` of `parts` of a whole parameter."""
    if kind == "whole" or parts == 1:
        return full
    if kind == "column":
        return full.chunk(parts, dim=0)[part]
    if kind == "row":
        return full.chunk(parts, dim=1)[part]
    assert kind == "qkv", kind
    thirds = full.view(3, full.shape[0] // 3, *full.shape[1:])
    return thirds.chunk(parts, dim=1)[part].reshape(full.shape[0] // parts, *full.shape[1:])


def join(shards: Sequence[Tensor], kind: str) -> Tensor:
    """The whole parameter from the parts of all ranks, in order: the inverse of `take`."""
    if kind == "whole" or len(shards) == 1:
        return shards[0]
    if kind == "column":
        return torch.cat(list(shards), dim=0)
    if kind == "row":
        return torch.cat(list(shards), dim=1)
    assert kind == "qkv", kind
    thirds = [s.view(3, s.shape[0] // 3, *s.shape[1:]) for s in shards]
    whole = torch.cat(thirds, dim=1)
    return whole.reshape(whole.shape[0] * whole.shape[1], *whole.shape[2:])

"""The whole weights on rank 0, from whatever slices the ranks hold (L2)."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.engine import split
from megagpt.engine.engine import Engine
from megagpt.engine.slices import Slice


def whole_weights(engine: Engine) -> Iterator[tuple[str, Tensor | None]]:
    """(canonical name, the whole fp32 weight on the host) of each parameter in turn; None on
    every rank but 0. All ranks must take all of them, for each is gathered when it is asked for."""
    own: dict[str, list[Slice]] = {}
    for one in engine.slices():
        if one.owned:
            own.setdefault(one.name, []).append(one)
    names = dict.fromkeys(name for names in engine.gather(list(own)) for name in names)
    first = engine.ranks.rank == 0
    for name in names:
        pieces = [(one.split, one.shape, one.start, _host(one)) for one in own.get(name, [])]
        held: list[list[_Piece]] | None = [[] for _ in range(engine.ranks.world)] if first else None
        dist.gather_object(pieces, held)
        yield name, _assembled([piece for one in held for piece in one]) if held else None


_Piece = tuple[object, tuple[int, ...], int, Tensor]
"""(split, shape of the tensor-parallel part, first element in it, elements)."""


def _host(one: Slice) -> Tensor:
    return one.read("fp32").detach().to("cpu", torch.float32, copy=True)


def _assembled(pieces: list) -> Tensor:
    """The whole parameter; every element of it is in some piece."""
    shape, kind, parts = pieces[0][1], pieces[0][0].kind, pieces[0][0].parts
    shards = torch.full((parts, torch.Size(shape).numel()), torch.nan)
    for how, _, start, values in pieces:
        shards[how.part, start : start + values.numel()] = values
    return split.join([shard.view(shape) for shard in shards], kind)

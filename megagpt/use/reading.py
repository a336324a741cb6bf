"""Layers of a model that only reads, on a CPU in fp32: generation (L3).

A token costs one pass over all matrices, so how they lie in memory decides. Measured for the 125M
shape (layers, output matrix) on one thread of an AMD EPYC, in ms:

| rows | torch, by rows | torch, by columns | oneDNN, by columns | oneDNN, packed |
|---|---|---|---|---|
| 1 | 26, 12 | 21, 7 | 35, 15 | 33, 11; filled up to four rows 25, 9 |
| 4 | 41, 27 | 48, 28 | 34, 17 | 22, 8 |
| 8 | 47, 30 | 52, 27 | 37, 18 | 29, 11 |
| 256 | | | 471 | 459 |

A single text so takes its matrices by columns: that is as fast as adding them up. Several take them
packed. Neither knows gradients here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.model.gpt import GPT, Embedding, Head, LayerClasses, Linear


def _operator(name: str) -> Any:
    """One of oneDNN's, which torch has for its compiler, or None in a build without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, name, None)


ONEDNN, PACK = _operator("_linear_pointwise"), _operator("_reorder_linear_weight")
ROWS = 32
"""More rows than these are filled up to a multiple of them: oneDNN keeps code for every shape that
it has met, some 300 kB each, and prompts have any length. Matrices are packed for so many."""
FEWEST = 4
"""Fewer rows than these are filled up to them where a matrix is packed: one alone takes longer."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D) times weight (R, D) transposed, plus bias (R,): (..., R)."""
    n = x.numel() // x.shape[-1]
    if not weight.is_mkldnn and (ONEDNN is None or x.dtype != torch.float32 or n == 1):
        return F.linear(x, weight, bias)
    flat = x.reshape(n, -1)
    if weight.is_mkldnn and n < FEWEST:
        flat = F.pad(flat, (0, 0, 0, FEWEST - n))
    elif n > ROWS and n % ROWS:
        flat = F.pad(flat, (0, 0, 0, -n % ROWS))
    y = ONEDNN(flat, weight, bias, "none", [], "")
    return y[:n].view(*x.shape[:-1], -1)


class ReadingLinear(Linear):
    """Linear without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class ReadingEmbedding(Embedding):
    """Embedding without gradients, which holds the output matrix a second time where it is packed:
    a packed matrix has no rows that an id could be looked up by."""

    packed: Tensor | None = None


class ReadingHead(Head):
    """The same of an output matrix that is not the embedding's."""

    packed: Tensor | None = None


def reading_logits(module: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden (..., D), without padding."""
    assert isinstance(module, ReadingEmbedding | ReadingHead)
    if module.packed is not None:
        return product(hidden, module.packed)
    return product(hidden, module.weight[: module.vocab_size])


READING = LayerClasses(
    column=ReadingLinear,
    row=ReadingLinear,
    embedding=ReadingEmbedding,
    head=ReadingHead,
    head_logits=reading_logits,
)


@torch.no_grad()
def store(model: GPT, rows: int) -> None:
    """Stores the matrices of a model made of READING for so many texts at a time: by columns for
    one, packed for several. One by one; their values and shapes stay."""
    if rows > 1 and ONEDNN is not None and PACK is not None:
        output = model.wte if model.head is None else model.head
        assert isinstance(output, ReadingEmbedding | ReadingHead)
        output.packed = PACK(output.weight[: output.vocab_size].contiguous(), ROWS)
        for module in model.modules():
            if isinstance(module, ReadingLinear):
                module.weight = nn.Parameter(PACK(module.weight, ROWS), requires_grad=False)
        return
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name != "wpe.weight":
            parameter.data = parameter.data.t().contiguous().t()

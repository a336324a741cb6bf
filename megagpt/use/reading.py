"""Layers of a model that only reads, on a CPU in fp32: generation (L3).

torch multiplies a few rows in fp32 by MKL. Measured for the matrices of 125M on one thread of an
AMD EPYC: one row takes 26 ms where they are stored by columns, 37 ms by rows; eight rows take 54 ms
by oneDNN, 73 ms by MKL; 256 rows 650 and 880 ms. Neither knows gradients here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.model.gpt import LayerClasses, Linear


def _onednn() -> Any:
    """oneDNN's product, which torch has for its compiler, or None in a build without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


ONEDNN = _onednn()


ROWS = 32
"""More rows than these are filled up to a multiple of them: oneDNN keeps code for every shape that
it has met, some 300 kB each, and prompts have any length."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D) times weight (R, D) transposed, plus bias (R,): (..., R)."""
    n = x.numel() // x.shape[-1]
    if ONEDNN is None or x.dtype != torch.float32 or n == 1:
        return F.linear(x, weight, bias)
    flat = x.reshape(n, -1)
    if n > ROWS and n % ROWS:
        flat = F.pad(flat, (0, 0, 0, -n % ROWS))
    y = ONEDNN(flat, weight, bias, "none", [], "")
    return y[:n].view(*x.shape[:-1], -1)


class ReadingLinear(Linear):
    """Linear without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def reading_logits(module: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden (..., D), without padding."""
    weight, vocab_size = module.weight, module.vocab_size
    assert isinstance(weight, Tensor) and isinstance(vocab_size, int)
    return product(hidden, weight[:vocab_size])


READING = LayerClasses(column=ReadingLinear, row=ReadingLinear, head_logits=reading_logits)


@torch.no_grad()
def store_by_columns(model: nn.Module) -> None:
    """Stores the matrices of a model by columns, one by one; their values and shapes stay."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name != "wpe.weight":
            parameter.data = parameter.data.t().contiguous().t()

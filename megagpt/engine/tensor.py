"""Tensor parallel: the model's layer classes with their matrices shared out over ranks (L2).

Megatron-LM's scheme (Shoeybi et al. 2019, section 3): a block's first linear is split by outputs
(column), its second by inputs (row), so that a block costs one all-reduce forward and one backward
for attention and for the MLP each; the embedding and the logits are split by vocabulary, and the
cross-entropy is computed on the shares.

Letters: B batch, T sequence, D width, R vocabulary rows of this rank, N ranks of the group.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.model import LayerClasses


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The ranks that share each layer, and this rank's place among them."""

    group: Any
    rank: int
    size: int


class _Copy(torch.autograd.Function):
    """Forward: the same on all ranks. Backward: the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    """Forward: the sum of all ranks' parts. Backward: the same gradient to each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _sum(x: Tensor, group: TensorGroup) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group.group)
    return x


def _split(*shape: int) -> nn.Parameter:
    """An empty parameter that DeepSpeed counts on every rank in the gradient norm."""
    parameter = nn.Parameter(torch.empty(*shape))
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


class ColumnLinear(nn.Module):
    """(B, T, d_in) -> (B, T, d_out / N): this rank's outputs."""

    ranks: TensorGroup

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = _split(d_out // self.ranks.size, d_in)
        self.bias = _split(d_out // self.ranks.size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_Copy.apply(x, self.ranks), self.weight, self.bias)


class RowLinear(nn.Module):
    """(B, T, d_in / N) -> (B, T, d_out): the sum over ranks, then the bias, once."""

    ranks: TensorGroup

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = _split(d_out, d_in // self.ranks.size)
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = _Reduce.apply(F.linear(x, self.weight), self.ranks)
        return y if self.bias is None else y + self.bias


class VocabularyEmbedding(nn.Module):
    """ids (B, T) -> (B, T, D); this rank holds rows [first, first + R) of the vocabulary."""

    ranks: TensorGroup

    def __init__(self, rows: int, d_model: int, vocab_size: int) -> None:
        super().__init__()
        own = rows // self.ranks.size
        self.vocab_size = vocab_size
        self.first = self.ranks.rank * own
        self.weight = _split(own, d_model)

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.first
        mine = (local >= 0) & (local < self.weight.shape[0])
        found = F.embedding(torch.where(mine, local, 0), self.weight)
        return _Reduce.apply(found * mine[..., None].to(found.dtype), self.ranks)


class _VocabularyCrossEntropy(torch.autograd.Function):
    """-log softmax over a vocabulary that is shared out; three small all-reduces."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first: int, group: TensorGroup
    ) -> Tensor:
        peak = logits.amax(1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group.group)
        shifted = logits - peak[:, None]
        local = targets - first
        mine = (local >= 0) & (local < logits.shape[1])
        index = torch.where(mine, local, 0)[:, None]
        chosen = torch.where(mine, shifted.gather(1, index)[:, 0], 0.0)
        mass = shifted.exp_().sum(1)
        sums = torch.stack([mass, chosen])
        dist.all_reduce(sums, group=group.group)
        ctx.save_for_backward(shifted.div_(sums[0][:, None]), mine, index)
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, mine, index = ctx.saved_tensors
        out = probabilities.clone()
        out.scatter_add_(1, index, -mine[:, None].to(out.dtype))
        return out * grad[:, None], None, None, None


def vocabulary_loss(module: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean loss (fp32 scalar) of hidden (B, T, D) with targets (B, T), logits never gathered.

    Rows of the vocabulary beyond vocab_size are padding and take no part.
    """
    assert isinstance(module, VocabularyEmbedding)
    flat = _Copy.apply(hidden.reshape(-1, hidden.shape[-1]), module.ranks)
    logits = F.linear(flat, module.weight)
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    real = module.vocab_size - module.first
    if real < logits.shape[1]:
        # Not -inf alone: a rank that holds nothing but padding would have no finite maximum.
        pad = torch.arange(logits.shape[1], device=logits.device) >= real
        logits = logits.masked_fill(pad, torch.finfo(logits.dtype).min)
    loss = _VocabularyCrossEntropy.apply(logits, targets.reshape(-1), module.first, module.ranks)
    return loss.mean()


def tensor_parts(ranks: TensorGroup) -> LayerClasses:
    """The layer classes for one tensor-parallel group."""
    if ranks.size == 1:
        return LayerClasses()
    held = {"ranks": ranks}
    return LayerClasses(
        column=type("ColumnLinear", (ColumnLinear,), held),
        row=type("RowLinear", (RowLinear,), held),
        embedding=type("VocabularyEmbedding", (VocabularyEmbedding,), held),
        head_loss=vocabulary_loss,
    )

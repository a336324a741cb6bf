"""Tensor parallel: the model's layer classes with their matrices shared out over ranks (L2).

Megatron-LM's scheme (Shoeybi et al. 2019, section 3): a block's first linear is split by outputs
(column), its second by inputs (row), so that a block costs one all-reduce forward and one backward
for attention and for the MLP each; the embedding and the logits are split by vocabulary, and the
cross-entropy is computed on the shares.

Letters: B batch, T sequence, D width, R vocabulary rows of this rank, N positions (B T).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megagpt.model import LayerClasses
from megagpt.model.kernels.loss import softmax_in_place


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The ranks that share each layer, and this rank's place among them.

    group: their process group; None for all ranks.
    """

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
    """(B, T, d_in) -> (B, T, d_out / ranks): this rank's outputs."""

    ranks: TensorGroup

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = _split(d_out // self.ranks.size, d_in)
        self.bias = _split(d_out // self.ranks.size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_Copy.apply(x, self.ranks), self.weight, self.bias)


class RowLinear(nn.Module):
    """(B, T, d_in / ranks) -> (B, T, d_out): the sum over ranks, then the bias, once."""

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
    """-log softmax over a vocabulary that is shared out; two small all-reduces.

    Overwrites this rank's logits (N, R) by their own softmax. Rows from `real` on are padding.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first: int, real: int, group: TensorGroup
    ) -> Tensor:
        n, dtype = len(logits), torch.promote_types(logits.dtype, torch.float32)
        local = targets - first
        mine = (local >= 0) & (local < real)
        index = torch.where(mine, local, 0)
        chosen = torch.where(mine, logits[torch.arange(n, device=logits.device), index], 0)
        chosen = chosen.to(dtype)
        if real:
            log_mass = softmax_in_place(logits[:, :real])
        else:  # nothing but padding; not -inf, whose differences are no numbers
            log_mass = torch.full_like(chosen, torch.finfo(dtype).min)
        peak = log_mass.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group.group)
        sums = torch.stack([(log_mass - peak).exp(), chosen])
        dist.all_reduce(sums, group=group.group)
        log_total = peak + sums[0].log()
        at_target = (sums[1] - log_total).exp() - 1.0
        ctx.real = real
        ctx.save_for_backward(logits, (log_mass - log_total).exp(), mine, index, at_target)
        return log_total - sums[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        softmax, share, mine, index, at_target = ctx.saved_tensors
        out, real = torch.empty_like(softmax), ctx.real
        torch.mul(softmax[:, :real], (share * grad)[:, None], out=out[:, :real])
        out[:, real:] = 0.0
        # One element of each row, so no order of adding matters.
        at = torch.arange(len(out), device=out.device), index
        out[at] = torch.where(mine, (at_target * grad).to(out.dtype), out[at])
        return out, None, None, None, None


def vocabulary_loss(module: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean loss (fp32 scalar) of hidden (B, T, D) over the targets (B, T) >= 0.

    The ranks' logits are never gathered, and padding takes no part.
    """
    assert isinstance(module, VocabularyEmbedding)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    rows = module.weight.shape[0]
    real = min(max(module.vocab_size - module.first, 0), rows)
    # Padding is multiplied too: its rows are there to round the shape.
    logits = F.linear(_Copy.apply(flat, module.ranks), module.weight)
    loss = _VocabularyCrossEntropy.apply(logits, targets, module.first, real, module.ranks)
    scored = targets >= 0
    return (loss * scored).sum() / scored.sum().clamp(min=1)


@torch.no_grad()
def vocabulary_logits(module: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden (..., D) on every rank, padding left out: for generation."""
    assert isinstance(module, VocabularyEmbedding)
    own = F.linear(hidden, module.weight).contiguous()  # (..., R)
    parts = [torch.empty_like(own) for _ in range(module.ranks.size)]
    dist.all_gather(parts, own, group=module.ranks.group)
    return torch.cat(parts, -1)[..., : module.vocab_size]


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
        head_logits=vocabulary_logits,
    )

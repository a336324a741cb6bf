"""Next-token cross-entropy without the full logits.

Letters: N positions (B T), D width, V vocabulary, R rows of the output matrix (V and padding).

The logits of a few hundred positions at a time live in one buffer: the chunk's logits become its
probabilities and then its gradients in place, and the gradients of the hidden states and of the
output matrix are finished before the next chunk begins. So the forward pass costs the three
matrix products that any training step needs, nothing is computed twice, and peak memory holds
CHUNK logits where the plain form holds N V several times over.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library, nn
from torch.autograd.function import once_differentiable

CHUNK = 1 << 26
"""Logits held at a time at most (128 MiB in bf16): 1,334 positions of GPT-2's vocabulary."""
SLICE = 1 << 20
"""Logits normalised at a time in fp32 (4 MiB), small enough to stay in a CPU's cache."""


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean of -log softmax(hidden weight^T)[target] over the targets >= 0: an fp32 scalar.

    `hidden` (..., D) and `weight` (R, D) of one dtype, `targets` (...) int64; negative targets are
    not scored (no scored target at all gives 0). Rows of `weight` from `vocab_size` on are padding
    and take no part. Logits are rounded to the dtype of `hidden`, as a plain matrix product would;
    softmax, loss and the sum over chunks are fp32 (fp64 for fp64 input).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _CrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        vocab_size,
        torch.is_grad_enabled(),
    )


def head_loss(module: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The model's loss from the last hidden state (B, T, D): mean over the targets >= 0, fp32.

    `module` holds the output matrix as `weight` and the vocabulary without padding as
    `vocab_size`: the embedding where the two are tied, the head where they are not.
    """
    return cross_entropy(hidden, module.weight, targets, module.vocab_size)  # type: ignore[arg-type]


def head_logits(module: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (..., V) from the last hidden state (..., D), without padding, in its dtype."""
    return nn.functional.linear(hidden, module.weight[: module.vocab_size])  # type: ignore


class _CrossEntropy(torch.autograd.Function):
    """Loss and, where wanted, both gradients in one pass; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, learns: bool
    ) -> Tensor:
        wanted = [learns and needed for needed in ctx.needs_input_grad[:2]]
        # On a GPU torch.compile may fuse what lies between the products; on a CPU it would keep
        # more logits than one chunk, so there it gets one operator, which fuses within itself.
        whole = torch.compiler.is_compiling() and hidden.device.type == "cpu"
        parts = hidden, weight, targets, vocab, wanted
        found = _operator(*parts) if whole else _loss_and_gradients(*parts, _normalise)
        total, grad_hidden, grad_weight = found
        inverse = 1.0 / (targets >= 0).sum().clamp(min=1).to(total.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, inverse)
        ctx.weight_dtype = weight.dtype
        return total * inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients above are those of the sum of the losses: scaling last keeps fp16's small
        # probabilities above its underflow, because `grad` carries the loss scale.
        grad_hidden, grad_weight, inverse = ctx.saved_tensors
        scale, found = grad * inverse, [None, None]
        if ctx.needs_input_grad[0]:
            found[0] = grad_hidden * scale.to(grad_hidden.dtype)
        if ctx.needs_input_grad[1]:
            found[1] = (grad_weight * scale).to(ctx.weight_dtype)
        return *found, None, None, None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    wanted: Sequence[bool],
    normalise: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss and its gradients for hidden (N, D) and weight (R, D); empty where unwanted.

    `normalise` turns a chunk's logits into their gradient in place and returns their loss.
    """
    wants_hidden, wants_weight = wanted
    n, rows = hidden.shape[0], weight.shape[0]
    assert n > 0, "a batch without a position has no loss"
    chunks = -(-n * rows // CHUNK)
    step = -(-n // chunks)
    logits = hidden.new_empty(step, rows)
    total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    grad_weight = _Sum(weight, chunks) if wants_weight else None
    for start in range(0, n, step):
        part = hidden[start : start + step]
        # Padding is multiplied and then masked: its rows are there to round the shape.
        chunk = torch.mm(part, weight.t(), out=logits[: part.shape[0]])
        chunk[:, vocab:] = float("-inf")
        total += normalise(chunk, targets[start : start + step])
        if wants_hidden:
            torch.mm(chunk, weight, out=grad_hidden[start : start + step])
        if grad_weight is not None:
            grad_weight.add_product(chunk, part, first=start == 0)
    return total, grad_hidden, weight.new_empty(0) if grad_weight is None else grad_weight.total


@library.custom_op("megagpt::loss_and_gradients", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _loss_and_gradients(hidden, weight, targets, vocab, wanted, _fused())


@functools.cache
def _fused() -> Callable[[Tensor, Tensor], Tensor]:
    # Chunks have at most two sizes, and their loops are faster when the sizes are known.
    return torch.compile(_normalise_whole, dynamic=False)


@_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(hidden) if hidden.shape[0] * weight.shape[0] > CHUNK else weight.dtype
    total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=wide) if wanted[1] else weight.new_empty(0)
    return total, grad_hidden, grad_weight


def _wide(hidden: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _Sum:
    """Sum over chunks of chunk^T (R, n) part (n, D), wide where there are several chunks."""

    def __init__(self, weight: Tensor, chunks: int) -> None:
        dtype = weight.dtype if chunks == 1 else _wide(weight)
        self.total = torch.empty_like(weight, dtype=dtype)
        # One buffer for every product: fresh memory of this size costs a CPU page faults.
        self.product = self.total if chunks == 1 else torch.empty_like(weight)

    def add_product(self, chunk: Tensor, part: Tensor, first: bool) -> None:
        if not first and self.total.dtype == chunk.dtype:
            self.total.addmm_(chunk.t(), part)
            return
        torch.mm(chunk.t(), part, out=self.product)
        if first and self.product is not self.total:
            self.total.copy_(self.product)
        elif not first:
            self.total += self.product


def _normalise(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits (n, R) into the gradient of the summed loss in place; return that sum."""
    total = torch.zeros((), dtype=_wide(logits), device=logits.device)
    step = max(1, SLICE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), step):
        part, target = logits[start : start + step], targets[start : start + step]
        p = part.to(total.dtype)
        p.sub_(p.amax(1, keepdim=True))
        index = target.clamp(min=0)[:, None]
        chosen = p.gather(1, index)
        p.exp_()
        mass = p.sum(1, keepdim=True)
        scored = (target >= 0)[:, None]
        total += ((mass.log() - chosen) * scored).sum()
        p.mul_(scored / mass)
        p.scatter_add_(1, index, -scored.to(p.dtype))
        part.copy_(p)
    return total


def _normalise_whole(logits: Tensor, targets: Tensor) -> Tensor:
    """The same without slices, as expressions that a compiler fuses into a few passes."""
    wide = logits.to(_wide(logits))
    top = wide.amax(1, keepdim=True)
    mass = (wide - top).exp().sum(1, keepdim=True)
    scored, index = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    chosen = wide.gather(1, index)
    target = torch.arange(logits.shape[1], device=logits.device) == index
    logits.copy_(((wide - top).exp() / mass - target.to(wide.dtype)) * scored)
    return ((mass.log() + top - chosen) * scored).sum()

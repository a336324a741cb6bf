"""Next-token cross-entropy without the full logits.

Letters: N positions (B T), n of them in a chunk, D width, V vocabulary, R rows of the output
matrix (V and padding).

The logits of some positions at a time live in one buffer: the chunk's logits become its
probabilities and then its gradients in place, and the gradients of the hidden states and of the
output matrix are finished before the next chunk begins. So the forward pass costs the three
matrix products that any training step needs, nothing is computed twice, and peak memory holds
one chunk of logits where the plain form holds N V several times over.

What stands between the products has three forms, which `loss_form` chooses from: on CUDA a Triton
kernel (`megagpt.model.kernels.loss_cuda`), on a CPU slices that stay in its cache, or expressions
that a compiler fuses. None of them adds by atomics, so each gives the same bits in every run.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library, nn
from torch.autograd.function import once_differentiable

from megagpt.model.kernels import missing_for_triton

CHUNK = 1 << 26
"""Logits held at a time at most (128 MiB in bf16): 1,334 positions of GPT-2's vocabulary."""
CUDA_CHUNK = 1 << 29
"""The same on a GPU (1 GiB in bf16): each chunk reads and writes the output matrix's gradient once
more, and small products leave most of the card idle."""
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


def loss_form(
    device: str, dtype: torch.dtype, compiling: bool = False, shared: bool = False
) -> str:
    """The form between the products: triton, sliced, compiled or expressions (slow: 58 bytes of
    memory traffic for each logit, where Triton's kernel has 4). `shared`: over a tensor split."""
    if device == "cpu" and not shared:
        return "compiled" if compiling else "sliced"
    triton = device != "cpu" and dtype != torch.float64 and not missing_for_triton()
    return "triton" if triton else "expressions"


def head_loss(module: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The model's loss from the last hidden state (B, T, D): mean over the targets >= 0, fp32.

    `module` holds the output matrix as `weight` and the vocabulary without padding as
    `vocab_size`: the embedding where the two are tied, the head where they are not.
    """
    return cross_entropy(hidden, module.weight, targets, module.vocab_size)  # type: ignore[arg-type]


def head_logits(module: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (..., V) from the last hidden state (..., D), without padding, in its dtype."""
    return nn.functional.linear(hidden, module.weight[: module.vocab_size])  # type: ignore


def softmax_in_place(logits: Tensor) -> Tensor:
    """Overwrites logits (N, R) by their softmax; each row's log of the sum of exponentials (N,).

    The part of a loss over a shared vocabulary that a rank does by itself.
    """
    nowhere = torch.full(logits.shape[:1], logits.shape[1], device=logits.device)
    form = loss_form(logits.device.type, logits.dtype, shared=True)
    return (_triton if form == "triton" else _expressions)(logits, nowhere)


class _CrossEntropy(torch.autograd.Function):
    """Loss and, where wanted, both gradients in one pass; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, learns: bool
    ) -> Tensor:
        wanted = [learns and needed for needed in ctx.needs_input_grad[:2]]
        # Within a compiled graph one operator: traced, its loop over the chunks would be unrolled,
        # and every chunk's logits kept.
        form = _operator if torch.compiler.is_compiling() else _loss_and_gradients
        total, grad_hidden, grad_weight = form(hidden, weight, targets, vocab, wanted)
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
    compiling: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss and its gradients for hidden (N, D) and weight (R, D); empty where unwanted."""
    wants_hidden, wants_weight = wanted
    n, rows = hidden.shape[0], weight.shape[0]
    assert n > 0, "a batch without a position has no loss"
    normalise = FORMS[loss_form(hidden.device.type, hidden.dtype, compiling)]
    chunks = _chunks(hidden, weight)
    step = -(-n // chunks)
    logits = hidden.new_empty(step, rows)
    total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    grad_weight = _Sum(weight, chunks) if wants_weight else None
    for start in range(0, n, step):
        part = hidden[start : start + step]  # (n, D)
        # Padding is multiplied and then masked: its rows are there to round the shape.
        chunk = torch.mm(part, weight.t(), out=logits[: part.shape[0]])  # (n, R)
        chunk[:, vocab:] = float("-inf")
        total += normalise(chunk, targets[start : start + step])
        if wants_hidden:
            torch.mm(chunk, weight, out=grad_hidden[start : start + step])
        if grad_weight is not None:
            grad_weight.add_product(chunk, part, first=start == 0)
    return total, grad_hidden, weight.new_empty(0) if grad_weight is None else grad_weight.total


@library.custom_op("megagpt::loss_and_gradients", mutates_args=())
def _operator(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _loss_and_gradients(hidden, weight, targets, vocab, wanted, compiling=True)


@_operator.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(hidden) if _chunks(hidden, weight) > 1 else weight.dtype
    total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=wide) if wanted[1] else weight.new_empty(0)
    return total, grad_hidden, grad_weight


def _chunks(hidden: Tensor, weight: Tensor) -> int:
    """Chunks of logits in which hidden (N, D) is scored."""
    most = CUDA_CHUNK if hidden.device.type == "cuda" else CHUNK
    return -(-hidden.shape[0] * weight.shape[0] // most)


def _wide(hidden: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _Sum:
    """Sum over chunks of chunk^T (R, n) part (n, D), wide where there are several chunks."""

    def __init__(self, weight: Tensor, chunks: int) -> None:
        dtype = weight.dtype if chunks == 1 else _wide(weight)
        self.total = torch.empty_like(weight, dtype=dtype)
        # On CUDA products come out wide. On a CPU each is rounded, into one buffer: fresh memory
        # of this size costs page faults.
        self.widens = weight.device.type == "cuda" and dtype != weight.dtype
        alike = chunks == 1 or self.widens
        self.product = self.total if alike else torch.empty_like(weight)

    def add_product(self, chunk: Tensor, part: Tensor, first: bool) -> None:
        if self.widens:
            wide = self.total.dtype
            if first:
                torch.mm(chunk.t(), part, out_dtype=wide, out=self.total)
            else:
                self.total += torch.mm(chunk.t(), part, out_dtype=wide)
            return
        if not first and self.total.dtype == chunk.dtype:
            self.total.addmm_(chunk.t(), part)
            return
        torch.mm(chunk.t(), part, out=self.product)
        if first and self.product is not self.total:
            self.total.copy_(self.product)
        elif not first:
            self.total += self.product


# --- from logits (n, R) to the gradient of their summed loss, in place; returns that sum ----------


def _sliced(logits: Tensor, targets: Tensor) -> Tensor:
    """SLICE logits at a time, each step written over the last."""
    total = torch.zeros((), dtype=_wide(logits), device=logits.device)
    step = max(1, SLICE // logits.shape[1])
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
        p.scatter_add_(1, index, -scored.to(p.dtype))  # one element of each row: in any order
        part.copy_(p)
    return total


def _by_rows(overwrite: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Tensor) -> Tensor:
    """The loss around a form that overwrites the logits and returns each row's log mass (n,)."""
    # Taken before: within one compiled function torch 2.11 would read what it has overwritten.
    chosen = logits.gather(1, y.clamp(min=0)[:, None])[:, 0]
    log_mass = overwrite(logits, y)
    return ((log_mass - chosen) * (y >= 0)).sum()


def _expressions(logits: Tensor, targets: Tensor) -> Tensor:
    """Expressions that a compiler fuses into a few passes."""
    wide = logits.to(_wide(logits))
    top = wide.amax(1, keepdim=True)
    mass = (wide - top).exp().sum(1, keepdim=True)
    target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    scored = (targets >= 0)[:, None]
    logits.copy_(((wide - top).exp() / mass - target.to(wide.dtype)) * scored)
    return (mass.log() + top)[:, 0]


def _compiled(logits: Tensor, targets: Tensor) -> Tensor:
    return _compiled_expressions()(logits, targets)


@functools.cache
def _compiled_expressions() -> Callable[[Tensor, Tensor], Tensor]:
    # Chunks have at most two sizes, and their loops are faster when the sizes are known.
    return torch.compile(_expressions, dynamic=False)


def _triton(logits: Tensor, targets: Tensor) -> Tensor:
    from megagpt.model.kernels.loss_cuda import softmax_gradient

    return softmax_gradient(logits, targets)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sliced": _sliced,
    "compiled": functools.partial(_by_rows, _compiled),
    "expressions": functools.partial(_by_rows, _expressions),
    "triton": functools.partial(_by_rows, _triton),
}
"""What `loss_form` names."""

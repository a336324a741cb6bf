"""From logits to the next token, and the loop that goes on from there (L3).

Letters: B batch, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megagpt.errors import UsageError
from megagpt.model import GPT


def distribution(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities (B, V), float64, of the next token after logits (B, V).

    Of equal logits at the edge of top-k or top-p, those of the lower ids stay. Top-p follows
    Holtzman et al. 2020: the token that reaches p is in.
    """
    logits = logits.double()
    if temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, likeliest, 1.0)
    # Without the largest logit first, a low temperature would overflow.
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature
    if top_k == 0 and top_p == 1.0:
        return logits.softmax(-1)
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    chosen = ordered.softmax(-1)
    if top_p < 1.0:
        before = chosen.cumsum(-1) - chosen
        chosen = chosen.masked_fill(before >= top_p, 0.0)
        chosen /= chosen.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, ids, chosen)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Next token (B,) int64 on the CPU, drawn from `distribution` of logits (B, V).

    One uniform number a row, from a CPU generator: the same seed draws alike on every device.
    """
    cumulated = distribution(logits.cpu(), temperature, top_k, top_p).cumsum(-1)
    uniform = torch.rand(len(cumulated), 1, generator=generator, dtype=torch.float64)
    # The first token whose sum is over the draw: never one of probability 0.
    return torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(-1)


def tokens(
    model: GPT, prompt: Tensor, draw: Callable[[Tensor], Tensor], n_vocab: int = 0
) -> Iterator[int]:
    """Tokens that follow the ids `prompt` (T,), T >= 1, without end.

    `draw` makes the next one (1,) of logits (1, V), as `sample` does. `n_vocab` > 0: only ids
    below it are drawn. Beyond n_ctx positions the text slides: the last half of the context is
    read anew, so that each token has at least that much before it. Of a prompt longer than n_ctx,
    the last n_ctx tokens count. Raises UsageError for an empty prompt.
    """
    if not len(prompt):
        raise UsageError("the prompt has no token; begin with END-OF-DOCUMENT for a free text")
    n_ctx = model.config.n_ctx
    device = next(model.parameters()).device
    context = prompt.tolist()[-n_ctx:]
    cache, ids = model.new_cache(1), context
    while True:
        logits = model.next_logits(torch.tensor([ids], device=device), cache)  # (1, V)
        token = int(draw(logits[:, :n_vocab] if n_vocab else logits))
        yield token
        context = [*context[-n_ctx + 1 :], token]
        if cache.length < n_ctx:
            ids = [token]
        else:
            cache, ids = model.new_cache(1), context[-max(1, n_ctx // 2) :]

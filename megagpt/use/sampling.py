"""From logits to the next token (L3).

Letters: B batch, V vocabulary, K candidates.

A draw is a function of (seed, sample, position) alone: what else is made at the same time, and on
which device, does not show in it.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from megagpt.use.options import BIAS, TextOptions

CANDIDATES = 256
"""Likeliest tokens among which top-p is sought first, before all are sorted."""


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that is decided by its arguments: the first 53 bits of their BLAKE2b."""
    digest = hashlib.blake2b(f"{seed} {sample} {position}".encode(), digest_size=8).digest()
    return float((struct.unpack("<Q", digest)[0] >> 11) * 2.0**-53)


def candidates(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The tokens (K,) that may follow logits (V,) and their probabilities (K,) float64, together 1.

    Of equal logits at the edge of top-k or top-p, those of the lower ids stay. Top-p follows
    Holtzman et al. 2020: the token that reaches p is in.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True), torch.ones(1, dtype=torch.float64)
    logits = logits.double()
    # Without the largest logit first, a low temperature would overflow.
    scaled = (logits - logits.max()) / temperature
    if top_k == 0 and top_p == 1.0:
        return torch.arange(len(logits), device=logits.device), scaled.softmax(-1)
    kept, mass = scaled, scaled.exp().sum()
    ids = torch.arange(len(logits), device=logits.device)
    if 0 < top_k < len(logits):
        ids = _likeliest(scaled, top_k)[:top_k]
        kept, mass = scaled[ids], scaled[ids].exp().sum()
    elif top_p < 1.0:
        likeliest = _likeliest(scaled, CANDIDATES)
        if scaled[likeliest].exp().sum() >= top_p * mass:
            ids, kept = likeliest, scaled[likeliest]
    if top_p < 1.0:
        order = kept.sort(descending=True, stable=True).indices
        chances = kept[order].exp() / mass
        ids, kept = ids[order], kept[order]
        before = chances.cumsum(-1) - chances
        n = max(1, int((before < top_p).sum()))
        ids, kept = ids[:n], kept[:n]
    return ids, kept.softmax(-1)


def _likeliest(logits: Tensor, k: int) -> Tensor:
    """The k largest of logits (V,) and all that equal the last of them: ids, the larger first, of
    equal ones the lower id first."""
    edge = logits.topk(min(k, len(logits))).values[-1]
    ids = (logits >= edge).nonzero().squeeze(-1)
    return ids[logits[ids].sort(descending=True, stable=True).indices]


def choose(chances: Tensor, draw: float) -> int:
    """Which of the probabilities (K,) a draw in [0, 1) falls on: never on one of 0."""
    cumulated = chances.cumsum(-1)
    return int(torch.searchsorted(cumulated, draw * float(cumulated[-1]), right=True))


def sample(logits: Tensor, options: TextOptions, number: int, position: int) -> int:
    """The next token after logits (V,): sample `number`'s token at `position` of its text."""
    if options.temperature == 0:
        # numpy's takes a tenth of torch's time; of equal logits the first, like it.
        return int(logits.float().cpu().numpy().argmax())
    ids, chances = candidates(
        logits.float().cpu(), options.temperature, options.top_k, options.top_p
    )
    return int(ids[choose(chances, uniform(options.seed, number, position))])


def adjusted(
    logits: Tensor,
    options: TextOptions,
    prompt: Sequence[int],
    text: Sequence[int],
    ends: Sequence[int],
) -> Tensor:
    """Logits (V,) with the penalties for the tokens of prompt and text, the biases, and without the
    tokens `ends` while the text is shorter than min_tokens."""
    logits = logits.float().clone()
    if options.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *text}), device=logits.device)
        seen = seen[seen < len(logits)]
        penalty = options.repetition_penalty
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if text and (options.frequency_penalty or options.presence_penalty):
        counts = torch.bincount(torch.tensor(text), minlength=len(logits))[: len(logits)]
        counts = counts.to(logits)
        logits -= options.frequency_penalty * counts + options.presence_penalty * (counts > 0)
    for token, bias in options.logit_bias.items():
        # The API's words for never; a large logit would outweigh it.
        logits[token] = -torch.inf if bias <= -BIAS else logits[token] + bias
    if len(text) < options.min_tokens:
        logits[list(ends)] = -torch.inf
    return logits

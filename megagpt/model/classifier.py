"""GPT-1's classifier: a linear head on the state at the extract token (section 3.2 and 3.3).

Letters: B samples, S parts of each, L tokens of a part, D width, C classes. A sample is S L ids;
its parts are read one by one. Where C = 1 the parts are what is chosen among, and each gets a
score; else the states of the parts are added, and C scores computed of the sum. The loss is

    cross-entropy of the class + lm_weight x next-token loss

of which the second is the mean over the scored tokens of each part, and then over the parts, as
in OpenAI's code, so that a short text weighs as much as a long one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError


class Classifier(nn.Module):
    """States (B, S, D) -> scores (B, C), or (B, S) where C = 1. Parameters start empty.

    One draw of dropout serves all parts of a sample, as in OpenAI's code: the parts that are
    chosen among are judged by the same features.
    """

    def __init__(self, d_model: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.weight = nn.Parameter(torch.empty(classes, d_model))
        self.bias = nn.Parameter(torch.empty(classes))

    def forward(self, states: Tensor) -> Tensor:
        states = states * F.dropout(torch.ones_like(states[:, :1]), self.dropout, self.training)
        if len(self.weight) == 1:
            return F.linear(states, self.weight, self.bias)[..., 0]  # (B, S)
        return F.linear(states.sum(1), self.weight, self.bias)  # (B, C)


def states_at_extract(x: Tensor, hidden: Tensor, config: ModelConfig) -> Tensor:
    """The states (B, S, D) at the first extract token of each part of the samples x (B, S L), where
    hidden (B S, L, D) are all of them."""
    rows = x.reshape(len(hidden), -1)
    places = (rows == config.vocab_size - 1).int().argmax(1)
    states = hidden[torch.arange(len(hidden), device=x.device), places]
    return states.view(len(x), config.parts, -1)


def classifier_loss(
    scores: Tensor,
    hidden: Tensor,
    targets: Tensor,
    next_token_loss: Callable[[Tensor, Tensor], Tensor],
    lm_weight: float,
) -> Tensor:
    """The loss (fp32 scalar), mean over the samples, of scores (B, C), hidden (B S, L, D) and
    targets (B, S L) of which the last of each sample is its class."""
    loss = F.cross_entropy(scores.float(), targets[:, -1])
    if not lm_weight:
        return loss
    # The target of a part's last token stands in the next part, or is the class.
    ids = targets.reshape(len(hidden), -1)[:, :-1]
    each = [next_token_loss(h, t) for h, t in zip(hidden[:, :-1], ids, strict=True)]
    return loss + lm_weight * torch.stack(each).mean()


def refuse_samples(config: ModelConfig, x: Tensor, y: Tensor) -> None:
    """Raises UsageError for samples x, y (B, n_ctx) without a class or an extract token; they are
    looked at on the CPU."""
    choices = config.classes if config.classes > 1 else config.parts
    if not ((y[:, -1] >= 0) & (y[:, -1] < choices)).all():
        wrong = next(int(n) for n in y[:, -1] if not 0 <= n < choices)
        raise UsageError(
            f"a sample ends in {wrong}, which is none of the classes 0 to {choices - 1} of "
            "model.classes and model.parts; write the samples with megagpt.corpus.forms"
        )
    extract = config.vocab_size - 1
    if not (x.reshape(-1, config.positions) == extract).any(1).all():
        raise UsageError(
            f"a sample has a part without the extract token, {extract}, the last id of the "
            "vocabulary; write the samples with megagpt.corpus.forms"
        )

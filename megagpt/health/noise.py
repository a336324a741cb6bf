"""The gradient noise scale: up to which batch more tokens a step pay off (L2).

McCandlish et al. 2018, appendix A.1: with g_b the gradient of a batch of b tokens, E|g_b|^2 =
|G|^2 + tr(S) / b. Two batch sizes give both unknowns, and the simple noise scale is
tr(S) / |G|^2, in tokens. The small batch is a micro-batch, of which every step has many; the
large one is the step's.

The token embedding is excluded: a pipeline holds its gradient in two halves on two ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megagpt.engine import Engine
from megagpt.health.norms import layer_of, square

EXCLUDED = "wte"
MEMORY = 0.9
"""Weight of what was known before a new sample: both unknowns are noisy, and are averaged."""


class MicroBatchNorms:
    """Adds up the squared gradients of this rank's micro-batches from here to `collect`.

    By hooks that see each gradient before DeepSpeed adds it to the others, cuts it or frees it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # Their squares are wanted in the loss's own units.
        self._scale = engine.loss_scale or 1.0
        self._squares = torch.zeros((), dtype=torch.float64, device=engine.device)
        self._hooks = [
            owned.parameter.register_hook(self._add)
            for owned in engine.parameters
            if owned.owned and layer_of(owned.name) != EXCLUDED
        ]

    def _add(self, grad: Tensor) -> None:
        self._squares += square(grad)

    def collect(self, n_micro_batches: int) -> float:
        """Ends watching; mean of |g|^2 over the step's micro-batches, so many on all ranks."""
        for hook in self._hooks:
            hook.remove()
        total = self.engine.total([float(self._squares)])[0]
        # Each loss is divided by the number on a rank, or by what comes to the same where some
        # ranks are idle.
        return total * n_micro_batches / self.engine.layout.data**2 / self._scale**2


def unknowns(
    small: float, large: float, small_tokens: int, large_tokens: int
) -> tuple[float, float]:
    """Estimates of (|G|^2, tr(S)) from |g|^2 of both batch sizes (equation A.2); the first may
    come out negative where the noise is much stronger than the signal."""
    signal = (large_tokens * large - small_tokens * small) / (large_tokens - small_tokens)
    noise = (small - large) / (1.0 / small_tokens - 1.0 / large_tokens)
    return signal, noise


class NoiseScale:
    """The running means of both unknowns; records are enough to go on from."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Takes in the sample of a record; its noise scale in tokens, once it is positive."""
        if "noise_trace" not in record:
            return {}
        # Both start from zero and share their weights, so the ratio needs no correction for it.
        self.signal = MEMORY * self.signal + (1.0 - MEMORY) * record["gradient_square"]
        self.noise = MEMORY * self.noise + (1.0 - MEMORY) * record["noise_trace"]
        sound = self.signal > 0 and self.noise > 0
        return {"noise_scale_tokens": self.noise / self.signal} if sound else {}


def sample(
    small: float, small_tokens: int, gradients: Mapping[str, float], batch_tokens: int
) -> dict[str, float]:
    """What is recorded of a step: gradient_square is |G|^2, and noise_trace tr(S), in tokens times
    the unit of the first. Nothing where the step is one micro-batch.

    `small` is the mean of |g|^2 over the micro-batches of `small_tokens`, `gradients` the norm of
    each layer's.
    """
    if batch_tokens <= small_tokens:
        return {}
    large = sum(norm**2 for layer, norm in gradients.items() if layer != EXCLUDED)
    signal, noise = unknowns(small, large, small_tokens, batch_tokens)
    return {"gradient_square": signal, "noise_trace": noise}

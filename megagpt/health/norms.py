"""Norms of each layer's weights, gradient and update, under every layout (L2).

No gradient is looked at: ZeRO 1 to 3 cut and free them where no other can see. Adam's second
moment v = b2 v' + (1 - b2) g^2 tells their squares, so the sum of v over a layer before and after
a step gives the norm of the gradient g that the step used, and the moments after it the update.
Each rank sums over what it owns; one all-reduce makes them whole. Nothing is copied or kept.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megagpt.config import OptimizerConfig, RunConfig
from megagpt.engine import Engine
from megagpt.engine.slices import Slice
from megagpt.model import decays, layers

CHUNK = 1 << 22
"""Elements that are worked on at a time."""
ROW = 1 << 12
"""Elements that are added up in float32; their sums are added up in float64, which is slow."""
Figures = dict[str, dict[str, float]]
"""figure -> layer -> value."""


def layer_of(name: str) -> str:
    """The layer of a parameter by its canonical name: h.3.mlp.c_fc.weight -> h.3."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "h" else 1])


def layer_names(config: RunConfig) -> list[str]:
    """The model's layers that have parameters, in order."""
    return [layer.name for layer in layers(config.model) if layer.tied_to is None]


class Norms:
    """Make one before a step and call `after` behind it, on all ranks."""

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.layers = layer_names(config)
        self._squares = self._zeros(1)[0]
        """Sum of Adam's second moments before the step, over this rank's part of each layer."""
        for layer, piece in self._owned():
            for part in piece.read("exp_avg_sq").split(CHUNK):
                self._squares[layer] += total(part)

    def _owned(self) -> Iterator[tuple[int, Slice]]:
        """This rank's slices, each with the number of its layer."""
        numbers = {name: number for number, name in enumerate(self.layers)}
        for piece in self.engine.slices():
            if piece.owned:
                yield numbers[layer_of(piece.name)], piece

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, len(self.layers), dtype=torch.float64, device=self.engine.device)

    def after(self, lr: float, grad_norm: float) -> Figures:
        """The figures of a step that was applied at `lr`; the gradient is that before clipping.

        parameter: norm of the weights after the step; gradient; update: norm of what the step
        added to the weights; ratio: update / parameter.
        """
        adam, updates = self.config.optimizer, self.engine.optimizer_state().updates
        sums = self._zeros(3)  # (weights, gradient, update) x layer
        for layer, piece in self._owned():
            for weight, second_moment, update in _updates(piece, adam, lr, updates):
                sums[0, layer] += square(weight)
                sums[1, layer] += total(second_moment)
                sums[2, layer] += square(update)
        sums[1] -= adam.betas[1] * self._squares
        sums[1] *= clip_factor(grad_norm, adam.gradient_clipping) ** 2 / (1.0 - adam.betas[1])
        # A difference of sums may fall below zero by its rounding.
        totals = torch.tensor(self.engine.total(sums.flatten().tolist()), dtype=torch.float64)
        rows = totals.clamp(min=0.0).sqrt().view(3, -1).tolist()
        figures: Figures = {
            figure: dict(zip(self.layers, row, strict=True))
            for figure, row in zip(("parameter", "gradient", "update"), rows, strict=True)
        }
        figures["ratio"] = {
            layer: figures["update"][layer] / norm if norm else 0.0
            for layer, norm in figures["parameter"].items()
        }
        return figures


def clip_factor(grad_norm: float, clipping: float) -> float:
    """What the gradient was divided by before the update; `clipping` 0: nothing."""
    return max(1.0, (grad_norm + 1e-6) / clipping) if clipping > 0 else 1.0


def _updates(
    piece: Slice, adam: OptimizerConfig, lr: float, updates: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(weights and second moments after the last update, what it added to the weights) of a slice,
    chunk by chunk.

    AdamW's update from its own moments (Loshchilov and Hutter 2019, algorithm 2): w = (1 - d) w'
    - s with d = lr x weight decay, so the weights before were w' = (w + s) / (1 - d).
    """
    beta1, beta2 = adam.betas
    decay = lr * adam.weight_decay if decays(piece.name) else 0.0
    reads = (piece.read(key).detach().split(CHUNK) for key in ("fp32", "exp_avg", "exp_avg_sq"))
    for w, m, v in zip(*reads, strict=True):
        root = (v / (1.0 - beta2**updates)).sqrt_().add_(adam.eps)
        step = (m * (lr / (1.0 - beta1**updates))).div_(root)
        yield w, v, -step - (w + step) * (decay / (1.0 - decay))


def total(values: Tensor) -> Tensor:
    """Sum of all elements, float64 scalar."""
    return sum((rows.sum(1).sum(dtype=torch.float64) for rows in _rows(values)), _ZERO)


def square(values: Tensor) -> Tensor:
    """Squared norm of all elements, float64 scalar."""
    norms = (torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) for rows in _rows(values))
    return sum((norm.double().square().sum() for norm in norms), _ZERO)


_ZERO = torch.zeros((), dtype=torch.float64)


def _rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """All elements: rows of ROW, and one row of what is left."""
    flat = values.reshape(-1)
    whole = flat.numel() - flat.numel() % ROW
    return flat[:whole].view(-1, ROW), flat[whole:].view(1, -1)

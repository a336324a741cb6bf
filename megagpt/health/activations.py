"""Size of each layer's output, sampled: one micro-batch of every data rank (L2)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.engine import Engine
from megagpt.health.norms import Figures, square


class Activations:
    """Watches the first forward pass of each layer from here to `collect`, on all ranks.

    `modules`: this rank's layers by canonical name; `names`: the layers of the whole model.
    """

    def __init__(self, engine: Engine, modules: Mapping[str, nn.Module], names: list[str]) -> None:
        self.engine, self.names = engine, names
        self._seen: dict[str, Tensor] = {}
        """Of each layer on this rank: sum of squares, exact zeros, elements, largest value."""
        self._hooks = [
            module.register_forward_hook(self._hook(name)) for name, module in modules.items()
        ]

    def _hook(self, name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            # A recomputed block passes here twice, and every micro-batch once.
            if name in self._seen:
                return
            with torch.no_grad():
                x = output.detach()
                zeros, count = (x == 0).sum(), torch.tensor(x.numel(), device=x.device)
                figures = (square(x), zeros, count, x.abs().max())
                self._seen[name] = torch.stack([figure.double() for figure in figures])

        return look

    def collect(self) -> Figures:
        """Ends watching. rms: root of the mean square; largest: the largest absolute value;
        zeros: share of exact zeros; of each layer's output."""
        for hook in self._hooks:
            hook.remove()
        unseen = torch.zeros(4, dtype=torch.float64)
        seen = torch.stack(
            [self._seen.get(name, unseen).cpu() for name in self.names]
        )  # (layer, 4)
        sums = self.engine.total(seen[:, :3].flatten().tolist())
        peaks = self.engine.largest(seen[:, 3].tolist())
        figures: Figures = {"rms": {}, "largest": {}, "zeros": {}}
        for row, name in enumerate(self.names):
            squares, zeros, count = sums[3 * row : 3 * row + 3]
            if count:
                figures["rms"][name] = (squares / count) ** 0.5
                figures["largest"][name] = peaks[row]
                figures["zeros"][name] = zeros / count
        return figures

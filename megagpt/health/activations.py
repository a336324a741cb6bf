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
                zeros = (x == 0).sum(dtype=torch.float64)
                self._seen[name] = torch.stack([square(x), zeros, x.abs().max().double()])
                self._count = x.numel()

        return look

    def collect(self) -> Figures:
        """Ends watching. rms: root of the mean square; largest: the largest absolute value;
        zeros: share of exact zeros; of each layer's output."""
        for hook in self._hooks:
            hook.remove()
        sums, peaks = [], []
        for name in self.names:
            seen = self._seen.get(name)
            squares, zeros, peak = (0.0, 0.0, 0.0) if seen is None else seen.tolist()
            sums += [squares, zeros, 0.0 if seen is None else float(self._count)]
            peaks.append(peak)
        whole, largest = self.engine.total(sums), self.engine.largest(peaks)
        found: Figures = {"rms": {}, "largest": {}, "zeros": {}}
        for row, name in enumerate(self.names):
            squares, zeros, count = whole[3 * row : 3 * row + 3]
            if count:
                found["rms"][name] = (squares / count) ** 0.5
                found["largest"][name] = largest[row]
                found["zeros"][name] = zeros / count
        return found

"""The evaluation within a run: the loss on every validation set, under any layout (L3)."""

import time
from collections.abc import Sequence

from megagpt.config import RunConfig
from megagpt.data.loader import TokenLoader
from megagpt.engine import Engine
from megagpt.intake import evaluation_samples
from megagpt.plan.layout import Layout


class Evaluation:
    """The run's validation sets. All ranks make one and call `run` together."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        engine: Engine,
        loaders: Sequence[TokenLoader],
    ) -> None:
        self.config, self.layout, self.engine, self.loaders = config, layout, engine, loaders

    def run(self) -> dict[str, object]:
        """What is to be recorded of the weights as they are; nothing without validation data."""
        t0 = time.perf_counter()
        sources = self.config.data.validation
        losses = {
            source.path: self._loss(loader)
            for source, loader in zip(sources, self.loaders, strict=True)
        }
        if not losses:
            return {}
        total = sum(s.weight * losses[s.path] for s in sources)
        return {
            "validation_loss": total / sum(s.weight for s in sources),
            "validation_losses": losses,
            "evaluate_s": time.perf_counter() - t0,
        }

    def _loss(self, loader: TokenLoader) -> float:
        """Mean loss of one set, nats per token."""
        count = evaluation_samples(self.config, loader.n_windows)
        rank = self.layout.data_rank(self.engine.ranks.rank)
        micro_batch = self.config.parallel.micro_batch
        batches = loader.micro_batches(0, count, rank, self.layout.data, micro_batch)
        return self.engine.evaluate(list(batches))

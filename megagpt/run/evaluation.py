"""The evaluation within a run: the loss on every validation set, under any layout (L2)."""

import math
from collections.abc import Sequence

from megagpt.config import RunConfig
from megagpt.engine import Engine
from megagpt.order.loader import TokenLoader
from megagpt.plan.layout import Layout, micro_batch_of
from megagpt.run.inputs import evaluation_samples


class Evaluation:
    """The run's validation sets. All ranks make one and call it together."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        engine: Engine,
        loaders: Sequence[TokenLoader],
    ) -> None:
        self.config, self.layout, self.engine, self.loaders = config, layout, engine, loaders
        self.scored = True
        """Whether each set had a target that is scored, the latest time; else there is no loss."""

    def losses(self) -> dict[str, object]:
        """What is to be recorded of the weights as they are; nothing without validation data.

        bits per byte: loss / ln 2 x tokens / bytes, those of the whole set, where it tells them.
        """
        sources = self.config.data.validation
        if not sources:
            return {}
        self.scored = True
        losses = [self._loss(loader) for loader in self.loaders]
        found: dict[str, object] = {
            "validation_loss": self._mean(losses),
            "validation_losses": {s.path: x for s, x in zip(sources, losses, strict=True)},
        }
        density = [bytes_per_token(loader) for loader in self.loaders]
        if all(density):
            bits = [x / math.log(2) / b for x, b in zip(losses, density, strict=True)]
            found["validation_bits_per_byte"] = self._mean(bits)
        return found

    def _mean(self, values: Sequence[float]) -> float:
        """Mean over the validation sets by their weights."""
        weights = [source.weight for source in self.config.data.validation]
        return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)

    def _loss(self, loader: TokenLoader) -> float:
        """Mean loss of one set, nats per token that is scored."""
        count = evaluation_samples(self.config, loader.n_windows)
        rank = self.layout.data_rank(self.engine.ranks.rank)
        micro_batch = micro_batch_of(self.config, self.layout, count * self.config.model.n_ctx)
        batches = loader.micro_batches(0, count, rank, self.layout.data, micro_batch)
        loss = self.engine.evaluate(list(batches), count)
        self.scored = self.scored and self.engine.scored
        return loss


def bytes_per_token(loader: TokenLoader) -> float:
    """Bytes of text per token of all its corpora; 0 where a manifest does not tell, and where not
    every token is scored."""
    if loader.masked:
        return 0.0
    sizes = [store.manifest.totals.get("text_bytes", 0) for store in loader.stores]
    tokens = sum(store.manifest.tokens for store in loader.stores)
    return sum(sizes) / tokens if all(sizes) and tokens else 0.0

"""The plain model: the list of layers, chained, with a KV cache for generation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.config.presets import ModelConfig
from megagpt.model.layers import KeyValues, Parts, layers

SCORED_LOGITS = 1 << 25
"""Logits that `GPT.losses` holds at a time (128 MiB in fp32)."""


class Cache:
    """Past positions of every layer, for `GPT.next_logits`."""

    def __init__(self, batch: int, config: ModelConfig) -> None:
        self.batch = batch
        self.length = 0
        """Positions so far."""
        self.layers = [KeyValues(config.band(i), config.n_ctx) for i in range(config.n_layer)]


class GPT(nn.Module):
    """A GPT of any family, built from `layers(config, parts)`; parameters start empty.

    Fill them with `initialise(model.named_parameters(), config, seed)` or from a checkpoint.
    `recompute_every` k > 0 keeps only the input of every k-th block in training and computes
    the block again in the backward pass; 0 keeps everything. Results are bit for bit the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts = Parts(),  # noqa: B008 (frozen)
        recompute_every: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.parts = parts
        self.recompute_every = recompute_every
        chain = [layer for layer in layers(config, parts) if layer.tied_to is None]
        built = {layer.name: layer.cls(**layer.kwargs) for layer in chain}
        self.wte = built["wte"]
        self.wpe = built["wpe"]
        self.h = nn.ModuleList(built[f"h.{i}"] for i in range(config.n_layer))
        self.ln_f = built.get("ln_f", nn.Identity())
        self.head = built.get("head")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss (fp32 scalar) of ids x (B, T) with targets y (B, T); y < 0 is not scored."""
        return self.parts.head_loss(self._output(), self._hidden(x), y)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of ids x (B, T), padding left out; what follows each position."""
        return self.parts.head_logits(self._output(), self._hidden(x))

    @torch.no_grad()
    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each target y (B, T) >= 0 after ids x (B, T), nats: (N,) fp32, row by row."""
        scored = y >= 0
        hidden, targets = self._hidden(x)[scored], y[scored]
        rows = max(1, SCORED_LOGITS // self.config.vocab_size)
        found = [
            F.cross_entropy(self.parts.head_logits(self._output(), h).float(), t, reduction="none")
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat(found)

    def new_cache(self, batch: int) -> Cache:
        """An empty cache for `batch` sequences of up to n_ctx positions."""
        return Cache(batch, self.config)

    @torch.no_grad()
    def next_logits(self, ids: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) of what follows ids (B, T), which continue the text already in the cache.

        Appends to the cache. Raises UsageError beyond n_ctx positions.
        """
        hidden = self.wpe(self.wte(ids), cache.length)
        for block, past in zip(self.h, cache.layers, strict=True):
            hidden = block(hidden, past)
        cache.length += ids.shape[1]
        return self.parts.head_logits(self._output(), self.ln_f(hidden[:, -1]))

    def _hidden(self, x: Tensor) -> Tensor:
        hidden = self.wpe(self.wte(x))
        keep = not (self.recompute_every and self.training and torch.is_grad_enabled())
        for index, block in enumerate(self.h):
            if keep or index % self.recompute_every:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=False)
        return self.ln_f(hidden)

    def _output(self) -> nn.Module:
        """The module that holds the output matrix."""
        return self.wte if self.head is None else self.head

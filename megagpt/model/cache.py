"""What a model keeps of the texts that it continues: keys and values of past positions.

Letters: R rows of the cache, B rows of one call, T new positions, S keys, H heads of this rank,
E width of a head, W band width.

A row is one text, of a length of its own. A dense layer keeps positions 0 .. length - 1. A banded
layer keeps a ring of W: position p stands at p mod W, over the one that has just left the band.
A query does not see the order of its keys, since positions are learned and lie in the embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError
from megagpt.model.kernels.attention import attend

GROWTH = 256
"""Positions that a dense layer's memory is made for at first; it doubles up to n_ctx."""


class KeyValues:
    """Keys and values of one layer, each (R, H, positions, E)."""

    def __init__(self, cache: "Cache", band: int | None) -> None:
        self.cache = cache
        self.band = band
        self.size = cache.n_ctx if band is None else min(band, cache.n_ctx)
        """Positions that are kept at most."""
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (B, H, T, E) of the new positions' q, k, v (B, H, T, E), which it takes in.

        For the rows and positions that the cache has made ready.
        """
        old_k, old_v = self._rows(k)  # (B, H, positions, E)
        if q.shape[2] == 1:
            return self._attend_one(q, k, v, old_k, old_v)
        start, end = self.cache.starts[0], self.cache.starts[0] + q.shape[2]
        if self.band is None:
            old_k[:, :, start:end], old_v[:, :, start:end] = k, v
            return attend(q, old_k[:, :, :end], old_v[:, :, :end])
        past = torch.arange(max(0, start - self.size + 1), start, device=k.device) % self.size
        seen_k = torch.cat([old_k[:, :, past], k], 2)
        seen_v = torch.cat([old_v[:, :, past], v], 2)
        y = attend(q, seen_k, seen_v, self.band)
        kept = torch.arange(max(start, end - self.size), end, device=k.device)
        old_k[:, :, kept % self.size] = k[:, :, kept - start]
        old_v[:, :, kept % self.size] = v[:, :, kept - start]
        return y

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> Tensor:
        """One new position of each row, wherever it stands."""
        starts, s = self.cache.starts, min(self.cache.end, self.size)
        assert self.k is not None and self.v is not None
        mask = None
        if len(set(starts)) == 1:  # also a single row: a copy of a stretch is cheaper
            place = starts[0] % self.size
            old_k[:, :, place : place + 1], old_v[:, :, place : place + 1] = k, v
        else:
            at, mask = self.cache.ready(self.size, self.k)
            # One row of E numbers for each text and head; an index in every dimension is slower.
            e = k.shape[3]
            self.k.view(-1, e).index_copy_(0, at, k.reshape(-1, e))
            self.v.view(-1, e).index_copy_(0, at, v.reshape(-1, e))
        return F.scaled_dot_product_attention(q, old_k[:, :, :s], old_v[:, :, :s], mask)

    def _rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the call's rows, (B, H, positions, E), with room for the new ones."""
        needed = min(self.size, self.cache.end)
        if self.k is None or self.v is None or self.k.shape[2] < needed:
            old = 0 if self.k is None else self.k.shape[2]
            positions = min(self.size, max(2 * old, -(-needed // GROWTH) * GROWTH))
            _, h, _, e = like.shape
            # Zeros: what no text has written is masked, and 0 times it must be 0.
            grown = [like.new_zeros(len(self.cache.lengths), h, positions, e) for _ in range(2)]
            if self.k is not None and self.v is not None:
                grown[0][:, :, :old], grown[1][:, :, :old] = self.k, self.v
            self.k, self.v = grown
        rows = slice(self.cache.first, self.cache.first + len(self.cache.starts))
        return self.k[rows], self.v[rows]


class Cache:
    """Past positions of R texts, all layers. `GPT.read` makes it ready and writes to it."""

    def __init__(self, rows: int, config: ModelConfig) -> None:
        self.n_ctx = config.n_ctx
        self.lengths = [0] * rows
        """Positions of each row so far."""
        self.layers = [KeyValues(self, config.band(i)) for i in range(config.n_layer)]
        self.first = 0
        """First row of the call."""
        self.starts: list[int] = []
        """Length of each of its rows before it, B."""
        self.end = 0
        """Longest of them after it."""
        self._device = torch.device("cpu")
        self._ready: dict[int, tuple[Tensor, Tensor | None]] = {}

    def begin(self, first: int, rows: int, t: int, device: torch.device) -> Tensor:
        """Makes rows `first` and on ready for T new positions each: their numbers (B, T) int64.

        Raises UsageError beyond n_ctx. Several positions at a time want rows of one length.
        """
        self.first, self.starts = first, self.lengths[first : first + rows]
        assert t == 1 or len(set(self.starts)) == 1, "rows of unlike lengths take one position each"
        self.end = max(self.starts) + t
        if self.end > self.n_ctx:
            raise beyond_context(self.end, self.n_ctx)
        self._device, self._ready = device, {}
        starts = torch.tensor(self.starts, device=device)
        return starts[:, None] + torch.arange(t, device=device)

    def ready(self, size: int, held: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of a call with T = 1 for rows of unlike lengths, for layers that keep `size` positions in
        `held` (R, H, positions, E): where each row's and head's new position goes in held as
        (R H positions, E), (B H,) int64; and what is added to the scores so that only a row's own
        keys are seen, (B, 1, 1, S), None where all are. Made once for all layers alike."""
        if size not in self._ready:
            _, h, room, _ = held.shape
            starts = torch.tensor(self.starts, device=self._device)
            rows = torch.arange(self.first, self.first + len(self.starts), device=self._device)
            heads = torch.arange(h, device=self._device)
            at = (rows[:, None] * h + heads) * room + (starts % size)[:, None]
            s = min(self.end, size)
            mask = None
            if min(self.starts) + 1 < s:
                hidden = torch.arange(s, device=self._device) > starts[:, None]  # (B, S)
                mask = held.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
            self._ready[size] = at.flatten(), mask
        return self._ready[size]

    def advance(self, t: int) -> None:
        """Counts the positions that every layer has taken in."""
        for row, start in enumerate(self.starts, self.first):
            self.lengths[row] = start + t

    def copy(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        self._write(target, source)
        self.lengths[target] = self.lengths[source]

    def clear(self, row: int) -> None:
        """Forgets a row, and its numbers, which may be no numbers."""
        self._write(row, None)
        self.lengths[row] = 0

    def _write(self, target: int, source: int | None) -> None:
        for layer in self.layers:
            # Row 0 is a source, too.
            rows = (target,) if source is None else (target, source)
            n = min(layer.size, max(self.lengths[row] for row in rows))
            for held in (layer.k, layer.v):
                if held is not None and n:
                    held[target, :, :n] = 0 if source is None else held[source, :, :n]


def beyond_context(positions: int, n_ctx: int) -> UsageError:
    """The error of a text that is too long for the learned positions."""
    return UsageError(
        f"{positions} positions, but the model's context is {n_ctx} tokens: shorten the text, or "
        "train with a larger n_ctx"
    )

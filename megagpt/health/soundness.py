"""Weights and moments are looked at before they are saved and after they are loaded (L2).

Whatever the gradients g were, of every element holds, with AdamW's rates b1 and b2:
1) weight and moments are finite, and v = b2 v' + (1 - b2) g^2 is not negative;
2) |m| <= C sqrt(v) with C^2 = (1 - b1)^2 / ((1 - b2) (1 - b1^2 / b2)), by Cauchy's inequality;
3) so an update moves a weight by at most about max(1, C) x its rate, and weights that were sound
   at one look lie within the sum of those at the next;
4) where gradients are clipped, v is at most the square of the clipping.
A NaN, an infinity, a changed sign of v and most changes of an exponent break one of them. A loss
that rises, or stays above that of a guess, breaks none. One pass over what the rank holds, one
small gathering.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megagpt.config import RunConfig
from megagpt.engine import Engine
from megagpt.engine.slices import STATES, Slice

CHUNK = 1 << 22
"""Elements that are worked on at a time."""
SLACK = 2.0
"""How far beyond a bound a figure must lie: rounding is far smaller."""
TINY = 1e-15
"""First moments below this are not held against the second, which underflows before them; with
Adam's eps they move nothing."""
NAMES = ("weight", "first moment", "second moment")
MOST = 5
"""Problems that a message names."""
Figures = Sequence[float]
"""Smallest and largest weight, first and second moment, and the largest |m| / sqrt(v)."""


class Soundness:
    """The bounds of one run. All ranks make one and call its methods together."""

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self.engine, self.adam = engine, config.optimizer
        (beta1, beta2), self.reach = self.adam.betas, math.inf
        if beta1**2 < beta2:
            self.reach = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
        self._known: dict[str, Figures] = {}
        """What was sound at the last look, by parameter; empty: what comes next is the first."""
        self._factor, self._moved = 1.0, 0.0
        """A weight w has since become at most _factor |w| + _moved."""

    def after_update(self, lr: float) -> None:
        """Call after each step that made an update."""
        # A decay beyond 2 would make weights grow.
        decay = max(1.0, abs(1.0 - lr * self.adam.weight_decay))
        self._factor *= decay
        self._moved = self._moved * decay + lr * max(1.0, self.reach)

    def look(self, anew: bool = False) -> list[str]:
        """What is not sound on any rank, the same on every rank; [] when all is.

        anew: the state was loaded or initialised, so that no earlier look bounds it.
        """
        if anew:
            self._known = {}
        pieces = [piece for piece in self.engine.slices() if piece.numel]
        rows = torch.stack([figures(piece) for piece in pieces]).tolist() if pieces else []
        found = {piece.name: row for piece, row in zip(pieces, rows, strict=True)}
        own = [
            f"rank {self.engine.ranks.rank}: {name}: {problem}"
            for name, row in found.items()
            if (problem := self._problem(row, self._known.get(name)))
        ]
        problems = [problem for of_rank in self.engine.gather(own[:MOST]) for problem in of_rank]
        if not problems:
            self._known, self._factor, self._moved = found, 1.0, 0.0
        return problems[:MOST]

    def _problem(self, row: Figures, known: Figures | None) -> str:
        """What is wrong with a parameter, "" when nothing is."""
        for name, low, high in zip(NAMES, row[0:6:2], row[1:6:2], strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                return f"a {name} is {high if math.isfinite(low) else low}"
        if row[4] < 0:
            return f"a second moment is {row[4]:.3g}, and a mean of squares is never negative"
        if known is None:
            return ""
        ratio = max(self.reach, known[6])
        if row[6] > SLACK * ratio:
            return (
                f"a first moment is {row[6]:.3g} times the root of its second moment, and Adam's "
                f"are at most {ratio:.3g} times it"
            )
        weight = max(-row[0], row[1])
        limit = self._factor * max(-known[0], known[1]) + SLACK * self._moved
        if weight > SLACK * TINY + limit * (1 + 1e-3):
            return f"a weight is {weight:.3g}, and no update can have brought it beyond {limit:.3g}"
        limit = max(known[5], self.adam.gradient_clipping**2)
        if self.adam.gradient_clipping and row[5] > SLACK * limit:
            return (
                f"a second moment is {row[5]:.3g}, and gradients clipped at "
                f"{self.adam.gradient_clipping:g} bring it to {limit:.3g} at most"
            )
        return ""


def figures(piece: Slice) -> Tensor:
    """Figures of a slice, (7,) float32 on its device; NaN where one of its elements is."""
    states = {key: piece.read(key).detach() for key in STATES}
    ends = [end for state in states.values() for end in torch.aminmax(state)]
    chunks = zip(states["exp_avg"].split(CHUNK), states["exp_avg_sq"].split(CHUNK), strict=True)
    ratios = [
        (m.abs() - TINY).clamp_(min=0).div_(v.sqrt().clamp_(min=1e-30)).max() for m, v in chunks
    ]
    return torch.stack([*ends, torch.stack(ratios).max()]).float()

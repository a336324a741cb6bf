"""The mixture: which source a sample comes from, by exact counting (L1, numpy).

Sample number s goes to one source and is that source's k-th draw; (source, k) is a function of s
and the weights alone, with no state and no random numbers. Two properties hold for every s:

- the samples before s give each source within 2 of weight * s draws, weights normalised to 1;
- each source's draws are numbered 0, 1, 2, ... without a gap, so that an epoch of a source reads
  every window of it once, whatever the other sources do.

How: the sources are the leaves of a Huffman tree over their weights, and each inner node shares
its samples out between its two children like Bresenham's line: of its first t samples, round(t *
p / q) go left, where p / q is the left child's share, in integers. A node rounds by at most 1/2,
and a child inherits its parent's error times its own share. In a Huffman tree a node weighs at
most half its grandparent, so the errors add up to less than (1 + 1 + 1/2 + 1/2 + 1/4 ...) / 2 = 2.

Changing a weight in the middle of a run would renumber the draws of the past, that is repeat some
windows and skip others. A change is therefore written down together with the sample number where
it begins (`changes`): everything before it stays as it was, and every source continues with its
next draw.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MAX_BLOCK = 1 << 20
"""Samples of one call of assign(); keeps its arithmetic inside int64."""

_MAX_TOTAL = 1 << 40
"""Largest sum of the integer weights. Decimals that need more digits are rounded to this
denominator, which moves a count by less than one in 10^12 samples."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A leaf (one source), or a fork that sends `share` of `total` to its left child."""

    source: int = -1
    left: "_Node | None" = None
    right: "_Node | None" = None
    share: int = 0
    total: int = 0

    def count_left(self, t: int) -> tuple[int, int]:
        """How many of the first t samples go left, with the remainder of the division by 2 total.

        Rounds t * share / total to nearest: floor((2 t share + total) / (2 total)).
        """
        return divmod(2 * t * self.share + self.total, 2 * self.total)


@dataclass(frozen=True, slots=True)
class _Phase:
    """A stretch of samples with one set of weights."""

    first: int
    """Its first sample."""
    tree: _Node
    before: tuple[int, ...]
    """Draws of each source before it."""


class Mixture:
    """Sources by weight; see the module for what holds.

    weights: one number for each source, of any scale. keys: a name for each source that does not
    depend on where it is listed; sources of equal weight take turns in the order of their keys.
    changes: (first sample, weights) in ascending order; 0 is a source that rests. Nothing is
    checked here: `DataConfig.problems` refuses a run file's impossible weights.
    """

    def __init__(
        self,
        weights: Sequence[float],
        keys: Sequence[str],
        changes: Sequence[tuple[int, Sequence[float]]] = (),
    ) -> None:
        self._phases: list[_Phase] = []
        for first, span_weights in [(0, weights), *changes]:
            before = self.counts(first) if self._phases else [0] * len(keys)
            self._phases.append(_Phase(first, _tree(span_weights, keys), tuple(before)))

    def counts(self, samples: int) -> list[int]:
        """Draws of each source among the first `samples` samples."""
        phase = max((p for p in self._phases if p.first <= samples), key=lambda p: p.first)
        counts = list(phase.before)
        todo = [(phase.tree, samples - phase.first)]
        while todo:
            node, t = todo.pop()
            if node.left is None or node.right is None:
                counts[node.source] += t
            else:
                left, _ = node.count_left(t)
                todo += [(node.left, left), (node.right, t - left)]
        return counts

    def assign(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and draw of samples first ... first + count - 1: two arrays int64 (count,)."""
        assert 0 <= first and 0 <= count <= MAX_BLOCK, (first, count)
        source, draw = np.empty(count, np.int64), np.empty(count, np.int64)
        ends = [p.first for p in self._phases[1:]] + [first + count]
        for phase, end in zip(self._phases, ends, strict=True):
            start, stop = max(first, phase.first), min(first + count, end)
            if start < stop:
                part = slice(start - first, stop - first)
                _assign(phase, start - phase.first, source[part], draw[part])
        return source, draw


def _assign(phase: _Phase, first: int, source: np.ndarray, draw: np.ndarray) -> None:
    """Fill source and draw (views, int64 (N,)) for the phase's samples first ... first + N - 1.

    Consecutive samples of a node are consecutive samples of each child, so one division of
    Python's unbounded integers places the block and int64 does the rest.
    """
    todo = [(phase.tree, first, np.arange(len(source)))]
    while todo:
        node, t, members = todo.pop()
        if node.left is None or node.right is None:
            source[members] = node.source
            draw[members] = np.arange(len(members)) + (t + phase.before[node.source])
            continue
        left, rest = node.count_left(t)
        line = (np.arange(len(members) + 1) * (2 * node.share) + rest) // (2 * node.total)
        goes_left = line[1:] > line[:-1]
        todo += [
            (node.left, left, members[goes_left]),
            (node.right, t - left, members[~goes_left]),
        ]


def _tree(weights: Sequence[float], keys: Sequence[str]) -> _Node:
    """The Huffman tree of the sources that have a weight, equal ones in the order of their keys."""
    shares = _integers([Fraction(str(float(weight))) for weight in weights])
    leaves = sorted((share, keys[i], i) for i, share in enumerate(shares) if share)
    # The serial number breaks ties, and so the tree does not depend on the order of the list.
    heap = [(share, serial, _Node(source=i)) for serial, (share, _, i) in enumerate(leaves)]
    for serial in range(len(heap), 2 * len(heap) - 1):
        (light, _, left), (heavy, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        common = math.gcd(light, heavy)
        total = light + heavy
        fork = _Node(left=left, right=right, share=light // common, total=total // common)
        heapq.heappush(heap, (total, serial, fork))
    return heap[0][2]


def _integers(weights: list[Fraction]) -> list[int]:
    """Integers in the ratio of the weights: exact when their sum can be at most _MAX_TOTAL."""
    total = sum(weights)
    exact = [weight / total for weight in weights]
    common = math.lcm(*(share.denominator for share in exact))
    if common <= _MAX_TOTAL:
        return [int(share * common) for share in exact]
    return [max(1, round(share * _MAX_TOTAL)) if share else 0 for share in exact]

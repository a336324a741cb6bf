"""The keyed permutation: a bijection, well mixed, and the same for ever."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.order.permutation import Permutation, shuffle


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_it_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    images = Permutation(n, seed, "corpus", epoch)(np.arange(n))
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 2**62), seed=st.integers(0, 2**63), data=st.data())
def test_any_position_alone_or_in_a_block(n: int, seed: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    order = Permutation(n, seed, "corpus")
    images = order(np.array(positions))
    assert images.min() >= 0 and images.max() < n
    assert len(set(images.tolist())) == len(positions)
    assert [int(order(np.array([p]))[0]) for p in positions] == images.tolist()


def test_it_is_the_same_for_ever() -> None:
    """A change of these numbers changes the data order of every run that anyone resumes."""
    assert Permutation(10, 1, "corpus")(np.arange(10)).tolist() == [2, 7, 6, 5, 9, 8, 3, 1, 4, 0]
    assert Permutation(10, 1, "corpus", 1)(np.arange(10)).tolist() == [5, 7, 8, 4, 6, 9, 0, 3, 2, 1]
    assert Permutation(10, 2, "corpus")(np.arange(10)).tolist() == [2, 8, 0, 5, 6, 1, 9, 3, 4, 7]
    assert Permutation(10, 1, "another")(np.arange(10)).tolist() == [3, 1, 0, 6, 8, 7, 9, 2, 5, 4]
    large = np.array([0, 1, 488_281_249])
    assert Permutation(488_281_250, 1337, "corpus")(large).tolist() == [
        39980448,
        447475428,
        355235924,
    ]
    assert Permutation(2**62, 1, "corpus")(np.array([0, 2**62 - 1])).tolist() == [
        841515360786775775,
        2650347289638889875,
    ]


@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_order_of_a_few_windows_is_equally_likely(n: int) -> None:
    """Chi-square over all n! orders; the seeds are fixed, and so is the outcome."""
    n_seeds = 40 * math.factorial(n)
    seen = Counter(tuple(Permutation(n, s, "c")(np.arange(n)).tolist()) for s in range(n_seeds))
    assert len(seen) == math.factorial(n)
    chi2 = sum((seen[o] - 40) ** 2 / 40 for o in itertools.permutations(range(n)))
    freedom = math.factorial(n) - 1
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [100, 1000, 1024])
def test_neighbours_are_spread_evenly(n: int) -> None:
    """Where a window comes, and what follows it, is uniform: chi-square over many seeds."""
    orders = np.stack([Permutation(n, seed, "c")(np.arange(n)) for seed in range(400)])
    positions = np.stack([np.bincount(orders[:, i], minlength=n) for i in range(n)])
    chi2, freedom = ((positions - 400 / n) ** 2 / (400 / n)).sum(), (n - 1) ** 2
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % n).reshape(-1), minlength=n)[1:]
    mean = steps.sum() / (n - 1)
    assert abs(((steps - mean) ** 2 / mean).sum() - (n - 2)) < 4 * math.sqrt(2 * (n - 2))


def test_a_large_order_looks_random() -> None:
    """First images of a large corpus: mean, spread and correlation with the position."""
    n, count = 488_281_250, 200_000
    images = Permutation(n, 7, "c")(np.arange(count)) / n
    assert abs(images.mean() - 0.5) < 4 * math.sqrt(1 / 12 / count)
    assert abs(images.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / count)
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(images[:-lag], images[lag:])[0, 1]) < 4 / math.sqrt(count)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), first=st.integers(0, 500), count=st.integers(1, 60))
def test_shuffle_counts_epochs(n: int, first: int, count: int) -> None:
    windows = shuffle(np.arange(first, first + count), n, 5, "corpus")
    for k, window in enumerate(windows.tolist(), first):
        order = Permutation(n, 5, "corpus", k // n)
        assert window == order(np.array([k % n]))[0]

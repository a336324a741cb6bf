"""The mixture: exact counts after any number of samples, draws without gaps."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.order.mixture import Mixture

GPT3 = [0.60, 0.22, 0.08, 0.08, 0.03]
"""Table 2.2 as printed; the sum is 1.01."""

weights_st = st.lists(
    st.one_of(st.integers(1, 1000), st.floats(1e-6, 1e6), st.sampled_from([0.1, 0.25, 1 / 3])),
    min_size=1,
    max_size=12,
)


def mixture(weights: list[float], **more: object) -> Mixture:
    """Sources called a, b, c ..."""
    return Mixture(weights, [chr(97 + i) for i in range(len(weights))], **more)  # type: ignore[arg-type]


def test_gpt3_by_hand() -> None:
    mix = mixture(GPT3)
    # 101 samples hold each source exactly as often as its printed percentage says.
    assert mix.counts(101) == [60, 22, 8, 8, 3]
    source, draw = mix.assign(0, 101)
    assert np.bincount(source).tolist() == [60, 22, 8, 8, 3]
    for i in range(5):
        assert draw[source == i].tolist() == list(range(mix.counts(101)[i]))
    # 300B tokens are 146,484,375 samples of 2048. The table prints 0.44, 2.9, 1.9, 0.43 and 3.4
    # epochs; its own weights and sizes give the figures below for WebText2 and Wikipedia.
    windows = [tokens * 10**9 // 2048 for tokens in (410, 19, 12, 55, 3)]
    epochs = [c / n for c, n in zip(mix.counts(146_484_375), windows, strict=True)]
    assert [round(e, 2) for e in epochs] == [0.43, 3.44, 1.98, 0.43, 2.97]


def test_one_to_one_takes_turns() -> None:
    assert mixture([1, 1]).assign(0, 6)[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert mixture([3, 1]).assign(0, 8)[0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0]


@settings(max_examples=80, deadline=None)
@given(weights=weights_st)
def test_every_prefix_is_within_two_samples(weights: list[float]) -> None:
    mix = mixture(weights)
    source, draw = mix.assign(0, 2000)
    taken = np.eye(len(weights), dtype=np.int64)[source].cumsum(0)
    wanted = np.arange(1, 2001)[:, None] * (np.array(weights) / sum(weights))
    assert np.abs(taken - wanted).max() < 2
    for i in range(len(weights)):
        assert np.array_equal(draw[source == i], np.arange(taken[-1, i]))


@settings(max_examples=80, deadline=None)
@given(weights=weights_st, samples=st.integers(0, 10**12), count=st.integers(0, 300))
def test_any_block_continues_the_counts(weights: list[float], samples: int, count: int) -> None:
    mix = mixture(weights)
    before, after = mix.counts(samples), mix.counts(samples + count)
    assert sum(before) == samples
    total = sum(Fraction(str(w)) for w in weights)
    for taken, weight in zip(before, weights, strict=True):
        assert abs(taken - samples * Fraction(str(weight)) / total) < 3
    source, draw = mix.assign(samples, count)
    for i in range(len(weights)):
        assert draw[source == i].tolist() == list(range(before[i], after[i]))


def test_thirds_are_exact_after_a_million_million_samples() -> None:
    assert mixture([1, 1, 1]).counts(3 * 10**12) == [10**12] * 3
    assert mixture([1.0, 2.0]).counts(3 * 10**15) == [10**15, 2 * 10**15]


@settings(max_examples=40, deadline=None)
@given(weights=weights_st, seed=st.integers(0, 1000))
def test_the_order_of_the_list_does_not_matter(weights: list[float], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(weights))
    keys = [f"{i:02d}" for i in range(len(weights))]
    source, draw = Mixture(weights, keys).assign(12345, 200)
    listed = Mixture([weights[i] for i in order], [keys[i] for i in order])
    source_2, draw_2 = listed.assign(12345, 200)
    assert np.array_equal(order[source_2], source) and np.array_equal(draw_2, draw)


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=2, max_size=4),
    gaps=st.lists(st.integers(1, 200), min_size=3, max_size=3),
    start=st.integers(0, 300),
)
def test_a_change_keeps_the_past_and_goes_on(
    weights: list[tuple[int, int, int]], gaps: list[int], start: int
) -> None:
    firsts = np.cumsum(gaps).tolist()
    changes = list(zip(firsts, weights[1:], strict=False))
    mix, first = mixture(list(weights[0]), changes=changes), firsts[0]
    past = mixture(list(weights[0])).assign(0, first)
    assert [a.tolist() for a in mix.assign(0, first)] == [a.tolist() for a in past]
    source, draw = mix.assign(0, 800)
    for i in range(3):
        assert np.array_equal(draw[source == i], np.arange(mix.counts(800)[i]))
    tail = mix.assign(start, 500)
    assert np.array_equal(tail[0], source[start : start + 500])
    assert np.array_equal(tail[1], draw[start : start + 500])
    for (begin, now), end in zip(changes, [*firsts[1 : len(changes)], 800], strict=True):
        took = np.bincount(source[begin:end], minlength=3)
        assert np.abs(took - (end - begin) * np.array(now) / sum(now)).max() < 2


def test_a_source_may_rest() -> None:
    mix = mixture([1, 0], changes=[(10, [1, 1]), (20, [0, 1])])
    assert mix.counts(10) == [10, 0]
    assert mix.counts(20) == [15, 5]
    assert mix.counts(30) == [15, 15]

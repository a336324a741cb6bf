"""A linear probe: how well a logistic regression on some features tells classes (Chen et al. 2020).

Strength of the regression, and the layer, are chosen on the last fifth of the training part; the
test part is looked at once. Letters: N images, D features.
"""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

FEW = (4, 10, 25)
"""Labels a class."""
STRENGTHS = (0.003, 0.03, 0.3, 3.0, 30.0)
"""Of the regression: inverse of its L2 penalty, on features of mean 0 and variance 1."""
CHOOSING = 5
"""Draws of few labels by which layer and strength are chosen."""

Kinds = dict[str, np.ndarray]
"""Name -> features (N, D)."""


class Labelled(NamedTuple):
    """One split."""

    kinds: Kinds
    labels: np.ndarray

    def rows(self, rows: slice | np.ndarray) -> "Labelled":
        """Some images of it."""
        return Labelled({name: x[rows] for name, x in self.kinds.items()}, self.labels[rows])


def accuracy(x: np.ndarray, y: np.ndarray, test: tuple[np.ndarray, np.ndarray], c: float) -> float:
    """Share of test (features, labels) that a regression of strength c on x (N, D), y tells, %."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(y)) < 2:  # too few for a regression, which would say no other
        return float(100 * (test[1] == y[0]).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where 300 steps of L-BFGS do not reach its tolerance
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300))
        return float(100 * model.fit(x, y).score(*test))


def drawn(labels: np.ndarray, few: int, number: int) -> np.ndarray:
    """Rows of draw `number`: `few` of each class, all where it is 0."""
    if not few:
        return np.arange(len(labels))
    pick = np.random.default_rng(number)
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    return np.concatenate([pick.choice(rows, min(few, len(rows)), False) for rows in classes])


def scores(train: Labelled, test: Labelled, how: tuple[str, float], few: int, draws: range) -> list:
    """Accuracies of so many draws; how: (kind of features, strength)."""
    name, c = how
    x, y, there = train.kinds[name], train.labels, (test.kinds[name], test.labels)
    rows = [drawn(y, few, number) for number in (draws if few else range(1))]
    return [accuracy(x[r], y[r], there, c) for r in rows]


def chosen(train: Labelled, names: list[str], few: int) -> tuple[str, float]:
    """The kind of features and the strength that do best on the last fifth of `train`."""
    cut = len(train.labels) * 4 // 5
    own, held = train.rows(slice(cut)), train.rows(slice(cut, None))
    every = [(name, c) for name in names for c in STRENGTHS]
    means = [np.mean(scores(own, held, how, few, range(CHOOSING))) for how in every]
    return every[int(np.argmax(means))]


def by_layer(train: Labelled, test: Labelled) -> dict[str, float]:
    """Accuracy of each kind of features with all labels, %."""
    hows = [chosen(train, [name], 0) for name in train.kinds]
    return {how[0]: scores(train, test, how, 0, range(1))[0] for how in hows}


def few_labels(train: Labelled, test: Labelled, few: int, raw: str, draws: int) -> str:
    """A line: the best kind of features and `raw`, mean and 95% interval of the mean of draws."""
    told = []
    for names in ([name for name in train.kinds if name != raw], [raw]):
        how = chosen(train, names, few)
        found = scores(train, test, how, few, range(1000, 1000 + draws))
        reach = student.ppf(0.975, draws - 1) * np.std(found, ddof=1) / np.sqrt(draws)
        told.append(f"{how[0]} {np.mean(found):.1f}% +- {reach:.1f}")
    least = min(few, *np.unique(train.labels, return_counts=True)[1])
    fewer = f" ({least} where it has no more)" if least < few else ""
    return f"{few} labels a class{fewer}: {', '.join(told)} (mean of {draws} draws)"


def over_splits(train: Labelled, test: Labelled, splits: int) -> list[str]:
    """Lines: the mean accuracy of each kind over random splits of both parts, as large as these,
    and how far the best one is ahead, with the 95% interval of Nadeau and Bengio 2003 for splits
    that overlap."""
    size, rest = len(train.labels), len(test.labels)
    kinds = {name: np.concatenate([x, test.kinds[name]]) for name, x in train.kinds.items()}
    both = Labelled(kinds, np.concatenate([train.labels, test.labels]))
    hows = [chosen(train, [name], 0) for name in train.kinds]
    found = []
    for number in range(splits):
        order = np.random.default_rng(number).permutation(size + rest)
        one, other = both.rows(order[:size]), both.rows(order[size:])
        found.append([scores(one, other, how, 0, range(1))[0] for how in hows])
    means = np.mean(found, 0)
    ahead = np.array(found)[:, [int(means.argmax())]] - found
    reach = student.ppf(0.975, splits - 1) * np.sqrt(
        (1 / splits + rest / size) * ahead.var(0, ddof=1)
    )
    return [
        f"{name}: {mean:.1f}% in {splits} splits, behind the best by {lag:.1f} +- {wide:.1f}"
        for (name, _), mean, lag, wide in zip(hows, means, ahead.mean(0), reach, strict=True)
    ]

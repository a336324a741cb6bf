"""Rows of unlike lengths in one cache: each gets the logits that it would get alone."""

import dataclasses
import random

import pytest
import torch

from megagpt.errors import UsageError
from megagpt.use.loading import cache_bytes
from tests.model.test_model import BANDED, FAMILIES, batch, build, family

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("config", FAMILIES, ids=family)
def test_rows_of_unlike_lengths_are_each_as_if_alone(config):
    model = build(config).double()
    if config.family == "igpt":
        torch.nn.init.normal_(model.head.weight)
    x, _ = batch(config, 4)
    cache, lengths = model.new_cache(4), [3, 11, 1, 6]
    for row, n in enumerate(lengths):
        model.read(x[row : row + 1, :n], cache, row)
    assert cache.lengths == lengths
    for step in range(10):
        ids = torch.stack([x[row, n + step] for row, n in enumerate(lengths)])[:, None]
        found = model.scores(model.read(ids, cache)[:, -1])
        for row, n in enumerate(lengths):
            alone = model.logits(x[row : row + 1, : n + step + 1])[0, -1]
            torch.testing.assert_close(found[row], alone, **EXACT)
    assert cache.lengths == [n + 10 for n in lengths]


def test_rows_move_end_and_begin_again():
    """A campaign: rows are read in pieces of any size, copied over each other and cleared."""
    model, draw = build(BANDED).double(), random.Random(1)
    x, _ = batch(BANDED, 6)
    cache, texts = model.new_cache(5), [0] * 5
    for _ in range(150):
        row = draw.randrange(5)
        room = BANDED.n_ctx - cache.lengths[row]
        if room == 0 or draw.random() < 0.15:
            cache.clear(row)
            texts[row] = draw.randrange(6)
        elif draw.random() < 0.15:
            other = draw.randrange(5)
            cache.copy(row, other)
            texts[other] = texts[row]
        else:
            start = cache.lengths[row]
            end = start + draw.randint(1, min(room, 9))
            text = x[texts[row]]
            found = model.scores(model.read(text[None, start:end], cache, row))
            torch.testing.assert_close(found, model.logits(text[None, :end])[:, start:], **EXACT)


def test_memory_grows_with_the_text_and_is_that_of_the_formula():
    config = dataclasses.replace(BANDED, n_ctx=1000, band_width=300)
    model = build(config)
    cache = model.new_cache(2)
    sizes = []
    for n in (200, 200, 200):
        model.read(torch.zeros(2, n, dtype=torch.int64), cache)
        sizes.append([layer.k.shape[2] for layer in cache.layers])
    assert sizes == [[256, 256, 256], [512, 300, 512], [1000, 300, 1000]]
    model.read(torch.zeros(2, 400, dtype=torch.int64), cache)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.k, layer.v))
    assert held == cache_bytes(config, [1000, 1000], 4) == 2 * 2 * 32 * 4 * (1000 + 300 + 1000)


def test_what_a_row_was_does_not_reach_the_next_text():
    """Not even numbers that are none, in a batch that masks them."""
    model = build(BANDED)
    x, _ = batch(BANDED)
    cache = model.new_cache(2)
    model.read(x[:1, :20], cache, 1)
    for layer in cache.layers:
        layer.v[1, :, :20] = float("nan")
    cache.clear(1)
    model.read(x[:1, :20], cache, 0)
    model.read(x[1:, :2], cache, 1)
    found = model.scores(model.read(torch.stack([x[0, 20], x[1, 2]])[:, None], cache))
    torch.testing.assert_close(found[1], model.logits(x[1:, :3])[:, -1], rtol=1e-4, atol=1e-6)
    assert found.isfinite().all()


def test_no_row_goes_beyond_the_context():
    model = build(BANDED)
    cache = model.new_cache(2)
    model.read(torch.zeros(1, 24, dtype=torch.int64), cache, 1)
    with pytest.raises(UsageError, match="25 positions, but the model's context is 24 tokens"):
        model.read(torch.zeros(2, 1, dtype=torch.int64), cache)
    assert cache.lengths == [0, 24]

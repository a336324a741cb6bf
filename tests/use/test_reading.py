"""The products of a model that only reads are those of the plain model."""

import dataclasses

import pytest
import torch

from megagpt.model import GPT
from megagpt.use.reading import FEWEST, ONEDNN, PACK, READING, ROWS, product, store
from tests.model.test_model import BANDED, FAMILIES, batch, build, family, next_logits


@pytest.mark.parametrize("shape", [(1, 32), (1, 1, 32), (7, 32), (2, 5, 32), (3, 15, 32)], ids=str)
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_product_is_torchs(shape, columns, dtype):
    draw = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*s, generator=draw).to(dtype) for s in (shape, (48, 32), (48,)))
    if columns:
        weight = weight.t().contiguous().t()
    most = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for some in (weight, weight[:40]):
        for b in (None, bias[: len(some)]):
            expected = torch.nn.functional.linear(x, some, b)
            torch.testing.assert_close(product(x, some, b), expected, rtol=most, atol=most)


@pytest.mark.parametrize("n", [1, 2, FEWEST, 7, ROWS, 45])
def test_a_product_with_a_packed_matrix_is_torchs(n):
    if PACK is None:
        pytest.skip("torch was built without oneDNN")
    draw = torch.Generator().manual_seed(n)
    x, weight, bias = (torch.randn(*s, generator=draw) for s in ((n, 32), (40, 32), (40,)))
    for b in (None, bias):
        found = product(x, PACK(weight, ROWS), b)
        expected = torch.nn.functional.linear(x, weight, b)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("config", FAMILIES, ids=family)
def test_the_model_computes_the_same(config, rows):
    plain = build(config)
    if config.family == "igpt":
        torch.nn.init.normal_(plain.head.weight)
    fast = GPT(config, READING)
    fast.load_state_dict(plain.state_dict())
    store(fast, rows)
    matrix = fast.h[0].mlp.c_fc.weight
    assert matrix.is_mkldnn if rows > 1 and PACK is not None else matrix.stride()[0] == 1
    x, _ = batch(config)
    with torch.no_grad():
        torch.testing.assert_close(fast.logits(x), plain.logits(x), rtol=1e-4, atol=1e-5)
    ours, theirs = fast.new_cache(2), plain.new_cache(2)
    for piece in x.split([5, 1, 1, 9, 8], 1):
        found, expected = (next_logits(m, piece, c) for m, c in ((fast, ours), (plain, theirs)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_onednn_is_there():
    """Where torch was built with it; otherwise products are torch's own."""
    for operator in (ONEDNN, PACK):
        assert (operator is not None) == torch.backends.mkldnn.is_available()
    assert dataclasses.replace(READING).row is READING.row and BANDED.n_head == 4

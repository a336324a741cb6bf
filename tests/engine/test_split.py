"""Tensor split: parts join to the whole again, and the parts are those of Megatron's layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.engine.split import KINDS, join, take, whole_shape

sizes = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), parts=st.integers(1, 4), rows=sizes, columns=sizes)
def test_parts_join_to_the_whole(kind, parts, rows, columns):
    shape = (3 * parts * rows, parts * columns)
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    shards = [take(full, kind, part, parts) for part in range(parts)]
    assert torch.equal(join(shards, kind), full)
    assert all(whole_shape(s.shape, kind, parts) == shape for s in shards)
    if kind != "whole":
        # Nothing twice, nothing lost.
        assert sorted(torch.cat([s.reshape(-1) for s in shards]).tolist()) == full.view(-1).tolist()


@pytest.mark.parametrize("kind", ["whole", "column", "qkv"])
def test_vectors_split_as_the_rows_of_their_matrix(kind):
    full = torch.arange(12.0)
    shards = [take(full, kind, part, 2) for part in range(2)]
    assert torch.equal(join(shards, kind), full)
    matrix = torch.stack([full, full + 100], dim=1)
    assert torch.equal(take(matrix, kind, 1, 2)[:, 0], shards[1])


def test_a_rank_holds_its_heads_of_q_k_and_v():
    # d_model 4, two heads of 2: rows q0 q1 q2 q3 k0 ... v3.
    full = torch.arange(12.0)
    assert take(full, "qkv", 0, 2).tolist() == [0, 1, 4, 5, 8, 9]
    assert take(full, "qkv", 1, 2).tolist() == [2, 3, 6, 7, 10, 11]


def test_column_then_row_parallel_is_the_whole_mlp():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64)
    up, down = torch.randn(8, 4, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    whole = torch.relu(x @ up.T) @ down.T
    parts = [
        torch.relu(x @ take(up, "column", p, 2).T) @ take(down, "row", p, 2).T for p in range(2)
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)

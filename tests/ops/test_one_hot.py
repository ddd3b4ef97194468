"""Sketches of gradients in which each token has one row or column, against one-hot matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activedpo_fast import ops
from activedpo_fast.ops import OneHotSum, reference
from tests.ops.test_ops import KEY, random
from tests.ops.test_outer_sketch import by_hand

# Rows and columns of the matrix, k: odd, prime, longer and shorter than runs and words.
SHAPES = [(1, 1, 1), (40, 16, 64), (7, 33, 96), (50, 5, 7), (3, 130, 4096), (300, 128, 512)]
SEGMENTS = torch.tensor([[31, 60, 2], [0, 30, 0], [30, 31, 3], [10, 10, 1], [3, 45, 2]])


def one_hot(places: torch.Tensor, length: int) -> torch.Tensor:
    found = torch.zeros(len(places), length, dtype=torch.float64)
    has = places >= 0
    found[has.nonzero().squeeze(1), places[has]] = 1.0
    return found


def both(shape, k, places, values, segments, by_column, method):
    """The sketch, and that of the matrices by hand."""
    left, right = (values, places) if by_column else (places, values)
    dense = [
        one_hot(side, length) if side.dtype == torch.int64 else side
        for side, length in zip((left, right), shape, strict=True)
    ]
    out = torch.zeros(5, k + 3, dtype=torch.float64)[:, :k]  # rows apart
    ops.one_hot_sketch_(out, OneHotSum(shape, places, values, by_column), segments, KEY, method)
    return out, by_hand(*dense, segments, k, 5, method)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_the_sketch_of_the_matrix(shape, method, by_column, dtype):
    *shape, k = shape
    torch.manual_seed(1)
    places = torch.randint(-1, shape[1] if by_column else shape[0], (60,))
    values = random(60, shape[0] if by_column else shape[1]).to(dtype)
    found, expected = both(tuple(shape), k, places, values, SEGMENTS, by_column, method)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert torch.linalg.norm(found - expected) <= tolerance * torch.linalg.norm(expected)
    assert found[0].any() and not found[1].any() and not found[4].any()


@given(
    st.integers(1, 60),
    st.integers(1, 300),
    st.integers(1, 400),
    st.sampled_from(("sjlt", "kronecker")),
    st.booleans(),
)
def test_random_shapes(height, width, k, method, by_column):
    places = torch.randint(-1, width if by_column else height, (60,))
    values = random(60, height if by_column else width)
    found, expected = both((height, width), k, places, values, SEGMENTS, by_column, method)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_many_tokens_and_far_rows(monkeypatch):
    """Positions beyond 2^32, and more tokens than are hashed at a time."""
    monkeypatch.setattr("activedpo_fast.ops.one_hot._CHUNK", 200)
    rows, columns = 1 << 27, 48
    places = torch.tensor([(1 << 27) - 1, 5, (1 << 27) - 1, 90_000_000, -1])
    values = random(5, columns)
    out = torch.zeros(1, 256, dtype=torch.float64)
    segments = torch.tensor([[0, 5, 0]])
    ops.one_hot_sketch_(out, OneHotSum((rows, columns), places, values), segments, KEY, "sjlt")
    expected = torch.zeros(256, dtype=torch.float64)
    for place, value in zip(places.tolist(), values.double(), strict=True):
        if place >= 0:
            positions = place * columns + torch.arange(columns)
            bucket, sign = reference.sjlt_hash(positions, KEY, 256)
            expected.index_add_(0, bucket, value * sign)
    torch.testing.assert_close(out[0], expected, rtol=1e-12, atol=1e-12)


def test_no_tokens():
    out = torch.zeros(2, 64, dtype=torch.float64)
    nothing = OneHotSum((4, 8), torch.full((3,), -1), random(3, 8))
    for method in ops.METHODS:
        ops.one_hot_sketch_(out, nothing, torch.tensor([[0, 3, 1]]), KEY, method)
        ops.one_hot_sketch_(out, nothing, torch.zeros(0, 3, dtype=torch.int64), KEY, method)
    assert not out.any()

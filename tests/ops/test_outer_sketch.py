"""Gradients sketched as they are formed: the C++ and the reference against float64 by hand."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activedpo_fast import ops
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import reference
from tests.ops.test_ops import KEY, needs_cpp, random, threads
from tests.support.quick import slow_except

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
SHAPES = [
    (1, 1, 1),
    (1, 500, 64),
    (500, 1, 64),
    (3, 7, 5),
    (8, 256, 64),
    (256, 8, 8192),
    (70, 300, 512),
    (300, 70, 100),
    (4, 9000, 4096),
    (9000, 3, 300),
    (129, 33, 50000),
]


def by_hand(left, right, segments, k: int, n: int, method: str) -> torch.Tensor:
    """The gradient of every row in float64, and the definition of its sketch."""
    gradients = torch.zeros(n, left.shape[1], right.shape[1], dtype=torch.float64)
    for start, end, row in segments.tolist():
        gradients[row] += left[start:end].double().T @ right[start:end].double()
    if method == "kronecker":
        return reference.kronecker(gradients, KEY, k)
    return getattr(reference, method)(gradients.flatten(1), KEY, k)


def sketch(left, right, segments, k: int, n: int, method: str) -> torch.Tensor:
    out = torch.zeros(n, k, dtype=torch.float64)
    ops.outer_sketch_(out, left, right, segments, KEY, method)
    return out


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    difference = (found - expected).norm(dim=1)
    assert bool((difference <= TOLERANCE[dtype] * expected.norm(dim=1).clamp(min=1e-30)).all())


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *(pytest.param("cpp", dtype, marks=needs_cpp) for dtype in TOLERANCE),
        # The reference with one dtype in every run.
        *slow_except([("reference", torch.float32)], product(["reference"], TOLERANCE)),
    ],
)
@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize(("height", "width", "k"), SHAPES)
def test_equals_the_sketch_of_the_gradient(height, width, k, method, dtype, backend, monkeypatch):
    if method == "rademacher":
        k = min(k, 10**7 // (height * width))  # the reference is slow
    monkeypatch.setenv("ACTIVEDPO_BACKEND", backend)
    left, right = random(150, height).to(dtype), random(150, width, seed=1).to(dtype)
    # Empty, of one token, overlapping, two of one row, and out of order.
    segments = torch.tensor([[51, 150, 2], [0, 50, 0], [50, 51, 3], [10, 10, 1], [3, 120, 2]])
    expected = by_hand(left, right, segments, k, 5, method)
    found = sketch(left, right, segments, k, 5, method)
    assert_near(found, expected, dtype)
    assert not found[1].any() and not found[4].any()


@needs_cpp
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(0, 30),
    st.sampled_from(ops.METHODS),
    st.data(),
)
def test_random_shapes(height, width, k, tokens, method, data):
    left, right = random(tokens, height), random(tokens, width, seed=1)
    bounds = st.tuples(st.integers(0, tokens), st.integers(0, tokens), st.integers(0, 3))
    runs = [(min(a, b), max(a, b), row) for a, b, row in data.draw(st.lists(bounds, max_size=6))]
    segments = torch.tensor(runs, dtype=torch.int64).view(-1, 3)
    found = sketch(left, right, segments, k, 4, method)
    assert_near(found, by_hand(left, right, segments, k, 4, method), torch.float64)


@needs_cpp
@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_equals_the_sketch_of_a_ready_gradient(method):
    """Both kinds of stored rows can be compared: the projection is the same."""
    left, right = random(20, 6), random(20, 31, seed=1)
    segments = torch.tensor([[0, 20, 0]])
    ready = torch.zeros(1, 64, dtype=torch.float64)
    getattr(ops, f"{method}_")(ready, (left.T @ right).flatten()[None], KEY)
    torch.testing.assert_close(sketch(left, right, segments, 64, 1, method), ready)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize(
    ("height", "width", "k", "rows"),
    [(8, 700, 256, 12), (700, 8, 256, 3), (200, 300, 128, 2), (64, 64, 8192, 20)],
)
def test_a_row_is_the_same_for_any_threads_and_neighbors(height, width, k, rows, method, dtype):
    left, right = random(rows * 9, height).to(dtype), random(rows * 9, width, seed=1).to(dtype)
    starts = torch.arange(rows) * 9
    segments = torch.stack([starts, starts + 7, torch.arange(rows)], dim=1)
    results = []
    for number in (1, 2, 5):
        with threads(number):
            results.append(sketch(left, right, segments, k, rows, method))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sketch(left, right, segments[order], k, rows, method), results[0])
    few = sketch(left, right, segments[: min(rows, 8)], k, rows, method)
    if rows >= 8:  # fewer rows may be cut into parts: another order of additions
        assert torch.equal(few[:8], results[0][:8])


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "reference"])
@pytest.mark.parametrize("method", ops.METHODS)
def test_adds_in_place_and_takes_any_strides(method, backend, monkeypatch):
    monkeypatch.setenv("ACTIVEDPO_BACKEND", backend)
    left, right, start = random(9, 5), random(9, 60, seed=1), random(2, 7, seed=2)
    segments = torch.tensor([[0, 4, 1], [4, 9, 0]])
    expected = start + by_hand(left, right, segments, 7, 2, method)
    wide = torch.full((2, 20), 9.0, dtype=torch.float64)
    outs = [start.clone(), start.t().contiguous().t(), wide[:, 3:10]]
    outs[2].copy_(start)
    lefts = [left.t().contiguous().t(), torch.cat([left, left], 1)[:, :5], left]
    rights = [torch.cat([right, right], 1)[:, 30:90].roll(30, 1), right.t().contiguous().t(), right]
    for out, one, other in zip(outs, lefts, rights, strict=True):
        ops.outer_sketch_(out, one, other, segments, KEY, method)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert bool((wide[:, :3] == 9).all()) and bool((wide[:, 10:] == 9).all())


@needs_cpp
@pytest.mark.parametrize("method", ops.METHODS)
def test_float32_keeps_small_entries_and_long_runs(method):
    """Entries of size 1e-8 next to entries of size 1; 3,000 tokens."""
    left, right = random(3000, 8), random(3000, 200, seed=1)
    left[:, 0] *= 1e-8
    segments = torch.tensor([[0, 3000, 0]])
    exact = left.float().double(), right.float().double()
    small = torch.zeros_like(exact[0])
    small[:, 0] = exact[0][:, 0]
    for part in (exact[0], small):
        expected = sketch(part, exact[1], segments, 64, 1, method)
        found = sketch(part.float(), exact[1].float(), segments, 64, 1, method)
        assert_near(found, expected, torch.float32)


def test_reference_is_the_same_in_chunks(monkeypatch):
    left, right = random(30, 4), random(30, 6, seed=1)
    segments = torch.tensor([[0, 9, 2], [9, 30, 0], [5, 12, 2]])
    whole = [reference.outer_sketch(left, right, segments, KEY, 16, 3, m) for m in ops.METHODS]
    monkeypatch.setattr(reference, "_GRADIENTS", 30)
    for method, expected in zip(ops.METHODS, whole, strict=True):
        torch.testing.assert_close(
            reference.outer_sketch(left, right, segments, KEY, 16, 3, method), expected
        )


@pytest.mark.parametrize(
    ("rows", "columns", "k", "sides"),
    [
        (8, 1024, 8192, (8, 1024)),
        (8, 4096, 8192, (8, 1024)),
        (4096, 8, 8192, (1024, 8)),
        (4096, 4096, 8192, (90, 90)),
        (1, 10, 3, (1, 3)),
        (5, 5, 1, (1, 1)),
    ],
)
def test_kronecker_sides(rows, columns, k, sides):
    assert reference.kronecker_sides(rows, columns, k) == sides


@pytest.mark.parametrize("k", [1, 2, 7, 16, 48, 100, 8192, 2**20 + 16, 2**31 - 1])
def test_kronecker_spreads_the_runs_of_a_matrix(k):
    runs = k // math.gcd(k, 16)
    places = [reference.kronecker_place(key, k) for key in range(200)]
    for first, stride in places:
        assert 0 <= first < runs and 0 <= stride < runs and math.gcd(stride, runs) == 1
    if runs > 1000:  # spread over all buckets, with different steps
        assert len(set(places)) > 190
        quarters = torch.tensor(places).double().div(runs).mul(4).long()
        for column in quarters.unbind(1):
            assert bool((column.bincount(minlength=4) > 30).all())


def test_overlaps_of_two_matrices_are_spread():
    """Two matrices, each with half as many numbers as there are buckets, share about a quarter of
    the buckets every time. Contiguous blocks would share between none and all of them."""
    k, entries = 8192, torch.ones(1, 8, 512)
    used = [reference.kronecker(entries, key, k)[0] != 0 for key in range(60)]
    shared = torch.tensor(
        [
            float((one & other).double().mean())
            for one, other in zip(used[::2], used[1::2], strict=True)
        ]
    )
    expected = (reference.kronecker_sides(8, 512, k)[0] * 512 / k) ** 2
    assert float(shared.mean()) == pytest.approx(expected, abs=0.05)
    assert float(shared.std()) < 0.05  # 0.14 for one contiguous block at a random place


GOOD = dict(
    out=torch.zeros(2, 3, dtype=torch.float64),
    left=torch.zeros(4, 5),
    right=torch.zeros(4, 6),
    segments=torch.tensor([[0, 4, 1]]),
    key=KEY,
    method="sjlt",
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="gauss"), "method is 'gauss'; known: sjlt, rademacher, kronecker"),
        (dict(out=torch.zeros(2, 3)), "out is torch.float32, expected torch.float64"),
        (dict(left=torch.zeros(4, 5).half()), "left is torch.float16 and right torch.float32"),
        (dict(left=torch.zeros(3, 5)), "left has 3 tokens and right 4"),
        (dict(left=torch.zeros(4, 0)), "left is 0 wide and right 6"),
        (
            dict(left=torch.zeros(4, 5, device="meta")),
            "out is on cpu, left on meta and right on cpu",
        ),
        (dict(left=torch.zeros(4, 5, requires_grad=True)), "left requires grad"),
        (dict(right=torch.zeros(4, 6, 1)), "right has shape (4, 6, 1), expected a dense matrix"),
        (dict(right=[[0.0]]), "right is a list, not a tensor"),
        (dict(out=torch.zeros(2, 0, dtype=torch.float64)), "out has 0 columns"),
        (dict(segments=torch.tensor([[0, 4]])), "segments are torch.int64 (1, 2) on cpu"),
        (dict(segments=torch.tensor([[0.0, 4, 1]])), "segments are torch.float32 (1, 3) on cpu"),
        (dict(segments=torch.tensor([[0, 5, 1]])), "a segment lies outside 4 tokens and 2 rows"),
        (dict(segments=torch.tensor([[-1, 2, 1]])), "a segment lies outside"),
        (dict(segments=torch.tensor([[3, 2, 1]])), "a segment lies outside"),
        (dict(segments=torch.tensor([[0, 4, 2]])), "a segment lies outside"),
        (dict(key=-1), "key is -1"),
    ],
)
def test_bad_arguments_are_one_clear_error(change, message):
    with pytest.raises(ActiveDPOError) as caught:
        ops.outer_sketch_(**{**GOOD, **change})
    assert str(caught.value).startswith(f"outer_sketch_: {message}")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ops.METHODS)
def test_reference_is_the_same_on_a_gpu(method):
    left, right = random(40, 12), random(40, 50, seed=1)
    segments = torch.tensor([[0, 9, 2], [9, 40, 0], [5, 12, 2]])
    found = reference.outer_sketch(left.cuda(), right.cuda(), segments, KEY, 130, 3, method)
    torch.testing.assert_close(
        found.cpu(), reference.outer_sketch(left, right, segments, KEY, 130, 3, method)
    )

"""`pair_lengths` as a GPU's lanes sum it: on the CPU, lane after lane, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from activedpo_fast.ops import backends
from activedpo_fast.ops.scores import lengths_there, pair_lengths
from tests.ops.test_scores import DTYPES, EPS, make_pairs, make_rows, plain_lengths
from tests.support.native import module_for_tests

# Around four numbers, the 128 of a warp's loads, and the 512 that it loads at a time.
WIDTHS = [*range(1, 10), 127, 128, 129, 511, 512, 513, 1100]


def by_lanes(rows: Tensor, pairs: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    return lengths_there(rows, pairs, by_row, module_for_tests())


def by_gpu(rows: Tensor, pairs: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    assert backends.choose("pair_lengths", "cuda", rows.dtype) == "cuda"
    return pair_lengths(rows.cuda(), pairs, by_row=by_row)


ways = pytest.mark.parametrize("measure", [by_lanes, pytest.param(by_gpu, marks=pytest.mark.gpu)])


@ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_row", [False, True])
def test_every_width_and_any_address(measure, dtype, by_row):
    """Some rows begin where four numbers can be loaded at once, and some do not."""
    for k in WIDTHS:
        storage = make_rows(23, k + 9, dtype, seed=k)
        storage[4] = 0
        pairs = make_pairs(21, 80, seed=k)
        for rows in (storage[:, :k].contiguous(), storage[:, 3 : k + 3], storage[:, 4 : k + 4]):
            norms, lengths = measure(rows, pairs, by_row)
            want_norms, want_lengths = plain_lengths(rows, pairs, by_row)
            assert norms.device.type == lengths.device.type == "cpu"
            torch.testing.assert_close(norms, want_norms, rtol=1e-14, atol=0)
            torch.testing.assert_close(
                lengths, want_lengths, rtol=1e-14, atol=4 * EPS if by_row else 0
            )


@ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_row", [False, True])
def test_the_distance_of_equal_rows_is_zero(measure, dtype, by_row):
    for k in (1, 7, 33, 513):
        rows = make_rows(8, k, dtype, seed=k).repeat(2, 1)
        pairs = torch.stack([torch.arange(8), torch.arange(8, 16)], dim=1)
        assert not measure(rows, pairs, by_row)[1].any()


@ways
def test_no_pairs_and_numbers_that_are_not_finite(measure):
    rows = torch.tensor([[1.0, torch.inf], [1.0, 2.0], [torch.nan, 0.0]])
    norms, lengths = measure(rows, torch.tensor([[0, 1], [1, 2]]), False)
    assert norms[0] == torch.inf and norms[1].isfinite() and norms[2].isnan()
    assert lengths[0] == torch.inf and lengths[1].isnan()
    norms, lengths = measure(rows, torch.empty(0, 2, dtype=torch.int64), True)
    assert norms.tolist() == [0, 0, 0] and lengths.shape == (0,)

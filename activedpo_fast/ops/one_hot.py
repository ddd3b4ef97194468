"""Sketches of gradients to which each token adds in one row or column only, as in embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from activedpo_fast.ops import reference
from activedpo_fast.ops.sketch import rademacher_

_CHUNK = 1 << 20  # numbers that are hashed at a time


class OneHotSum(NamedTuple):
    """A matrix's gradients as sums over runs of tokens, each in one row (column) of the matrix.

    Attributes:
        shape: of the matrix.
        places: int64 [N], the row of each token, or with `by_column` its column; -1: none.
        values: [N, columns] (`by_column`: [N, rows]), what the token adds there, of a floating
            dtype.
    """

    shape: tuple[int, int]
    places: Tensor
    values: Tensor
    by_column: bool = False

    def tokens(self, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows of the output, places and values of the tokens in `segments`, in float32 or
        float64. A token is there once for each segment that it is in."""
        device = self.places.device
        runs = segments.tolist()
        token = torch.cat([torch.arange(start, end) for start, end, _ in runs] or [segments[:, 0]])
        lengths = segments[:, 1] - segments[:, 0]
        of = torch.repeat_interleave(segments[:, 2], lengths).to(device)
        token = token.to(device)
        has_place = self.places[token] >= 0
        of, token = of[has_place], token[has_place]
        return of, self.places[token], self.values[token].to(reference.sum_dtype(self.values.dtype))

    def add_to(self, matrix: Tensor, places: Tensor, values: Tensor) -> None:
        """Add the given tokens to one gradient, [rows, columns]."""
        values = values.to(matrix.dtype)
        if self.by_column:
            matrix.index_add_(1, places, values.T)
        else:
            matrix.index_add_(0, places, values)


def one_hot_sketch_(out: Tensor, of: OneHotSum, segments: Tensor, key: int, method: str) -> None:
    """out[row] += S vec(the gradient of a run of tokens), for every run, in place.

    The result is that of `outer_sketch_` with one-hot vectors on one side, for less work.

    Args:
        out: float64 [n, k], on the device of the tokens. segments: as in `outer_sketch_`.
        key: 0 <= key < 2^64, from `Sketch.key`. method: one of METHODS.

    Values are summed in float64; with "rademacher", as by `rademacher_`.
    """
    rows, places, values = of.tokens(segments)
    if method == "rademacher":
        for row in rows.unique().tolist():
            here = rows == row
            gradient = values.new_zeros(of.shape)
            of.add_to(gradient, places[here], values[here])
            part = values.new_zeros(1, out.shape[1])
            rademacher_(part, gradient.view(1, -1), key)
            out[row] += part[0]
        return
    add = _sjlt if method == "sjlt" else _kronecker
    # Tokens that repeat are hashed once if they are neighbors.
    order = places.argsort(stable=True)
    step = max(1, _CHUNK // max(values.shape[1], 1))
    for part in order.split(step):
        out += add(of, rows[part], places[part], values[part].double(), len(out), key, out.shape[1])


def _sjlt(
    of: OneHotSum, rows: Tensor, places: Tensor, values: Tensor, n: int, key: int, k: int
) -> Tensor:
    distinct, which = places.unique_consecutive(return_inverse=True)
    if of.by_column:
        positions = torch.arange(of.shape[0], device=rows.device) * of.shape[1] + distinct[:, None]
        bucket, sign = reference.sjlt_hash(positions.flatten(), key, k)
        bucket, sign = bucket.view_as(positions), sign.view_as(positions)
    else:
        bucket, sign = reference.sjlt_hash_of_rows(distinct, of.shape[1], key, k)
    sums = values.new_zeros(n * k)
    _add_at(sums, rows[:, None] * k + bucket[which], values * sign[which])
    return sums.view(n, k)


def _kronecker(
    of: OneHotSum, rows: Tensor, places: Tensor, values: Tensor, n: int, key: int, k: int
) -> Tensor:
    a, b = reference.kronecker_sides(*of.shape, k)
    streams = reference.KRONECKER_STREAMS
    along = torch.arange(values.shape[1], device=rows.device)
    row, column = (along, places) if of.by_column else (places, along)
    row_bucket, row_sign = reference.kronecker_hash(row, of.shape[0], a, key, streams[0])
    column_bucket, column_sign = reference.kronecker_hash(column, of.shape[1], b, key, streams[1])
    if of.by_column:
        place = row_bucket * b + column_bucket[:, None]
        sign = row_sign * column_sign[:, None]
    else:
        place = row_bucket[:, None] * b + column_bucket
        sign = row_sign[:, None] * column_sign
    both = values.new_zeros(n * a * b)
    _add_at(both, rows[:, None] * (a * b) + place, values * sign)
    return reference.kronecker_placed(both.view(n, a * b), key, k)


def _add_at(sums: Tensor, places: Tensor, values: Tensor) -> None:
    """sums[place] += value, in an order that is the same on every run."""
    places, values = places.flatten(), values.flatten()
    if sums.is_cuda:  # index_add_ would use atomics
        sums.index_put_((places,), values, accumulate=True)
    else:
        sums.index_add_(0, places, values)

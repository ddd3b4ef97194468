"""Bounds for fixed-point sums of sketched gradients (Triton).

A token's part of a gradient has the norm |left_t| |right_t|. The norms of a run's tokens bound the
sum of the absolute values of the run's gradient, and so its sketch, whatever the buckets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels.fixed_point import raise_bound
from activedpo_fast.kernels.jobs import (
    COLUMNS,
    FIELDS,
    LEFT,
    LEFT_STEP,
    RIGHT,
    RIGHT_STEP,
    ROWS,
    operand_at,
)
from activedpo_fast.kernels.launching import ELEMENTS, NAMES, cdiv
from activedpo_fast.kernels.variants import LAUNCH, Variant, variant

_TOKENS, _NUMBERS = 4, 512  # of a block of token_norms_kernel
_BLOCK = 256


@triton.jit
def _squared_norms(x, step, width, token, tokens, UNIT: tl.constexpr, BT: tl.constexpr,
                   BC: tl.constexpr):
    """Return squared norms, float64 [BT], of rows of x; numbers are scaled to about one first."""
    at = x + token.to(tl.int64)[:, None] * (step * UNIT) + tl.arange(0, BC)[None, :]
    total = tl.zeros([BT], tl.float64)
    for first in range(0, width, BC):
        mask = (token < tokens)[:, None] & (
            first + tl.arange(0, BC) < tl.cdiv(width, UNIT) * UNIT)[None, :]
        part = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        # The power of two below the largest, from 2^-120 to 2^120, from its exponent bits.
        largest = tl.max(tl.abs(part), 1).to(tl.int32, bitcast=True) & 0x7F800000
        largest = tl.minimum(tl.maximum(largest, 7 << 23), 247 << 23)
        part *= (0x7F000000 - largest).to(tl.float32, bitcast=True)[:, None]
        scale = largest.to(tl.float32, bitcast=True).to(tl.float64)
        total += scale * scale * tl.sum(part * part, 1).to(tl.float64)
        at += BC
    return total


@triton.jit(do_not_specialize=["norms", "jobs", "tokens"])
def token_norms_kernel(norms, jobs, tokens: tl.int64, UNIT: tl.constexpr, BT: tl.constexpr,
                       BC: tl.constexpr, ELEMENT: tl.constexpr, FIELDS: tl.constexpr):
    """norms[job, t] = |left_t| |right_t|, float64 [P, tokens]."""
    job = jobs + tl.program_id(1) * FIELDS
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    one = _squared_norms(operand_at(job, LEFT, ELEMENT), tl.load(job + LEFT_STEP),
                         tl.load(job + ROWS).to(tl.int32), token, tokens, UNIT, BT, BC)
    other = _squared_norms(operand_at(job, RIGHT, ELEMENT), tl.load(job + RIGHT_STEP),
                           tl.load(job + COLUMNS).to(tl.int32), token, tokens, UNIT, BT, BC)
    tl.store(norms + tl.program_id(1) * tokens.to(tl.int64) + token, tl.sqrt(one * other),
             mask=token < tokens)


@triton.jit(do_not_specialize=["bounds", "norms", "jobs", "segments", "tokens"])
def segment_bounds_kernel(bounds, norms, jobs, segments, tokens: tl.int64, BT: tl.constexpr,
                          FIELDS: tl.constexpr):
    """Bound each segment's numbers by the gradient's sum of absolute values, whatever the buckets.

    It is at most sqrt(rows columns) times the gradient's norm (Cauchy-Schwarz).
    """
    segment = segments + 3 * tl.program_id(0).to(tl.int64)
    start, end, row = tl.load(segment), tl.load(segment + 1), tl.load(segment + 2)
    if start == end:
        return
    job = jobs + tl.program_id(1) * FIELDS
    norms += tl.program_id(1) * tokens.to(tl.int64)
    total = tl.zeros([BT], tl.float64)
    for t in range(0, (end - start).to(tl.int32), BT):
        token = start + t + tl.arange(0, BT)
        total += tl.load(norms + token, mask=token < end, other=0.0)
    size = tl.load(job + ROWS).to(tl.float64) * tl.load(job + COLUMNS).to(tl.float64)
    raise_bound(bounds, row, tl.sum(total, 0) * tl.sqrt(size))


def raise_bounds(bounds: Tensor, jobs: Tensor, dtype: torch.dtype, tokens: int,
                 segments: Tensor) -> None:
    """Raise the bounds of all segments' rows; jobs: rows of the table, of one dtype and number of
    tokens."""
    norms = torch.empty(len(jobs), tokens, dtype=torch.float64, device=bounds.device)
    token_norms_kernel[(cdiv(tokens, _TOKENS), len(jobs))](
        norms, jobs, tokens, UNIT=16 // dtype.itemsize, BT=_TOKENS, BC=_NUMBERS,
        ELEMENT=ELEMENTS[dtype], FIELDS=FIELDS, **LAUNCH)
    segment_bounds_kernel[(len(segments), len(jobs))](
        bounds, norms, jobs, segments, tokens, BT=_BLOCK, FIELDS=FIELDS, **LAUNCH)


def variants() -> list[Variant]:
    found = [variant(token_norms_kernel, f"token_norms {name}",
                     {"norms": "*fp64", "jobs": "*i64"},
                     dict(UNIT=16 // dtype.itemsize, BT=_TOKENS, BC=_NUMBERS,
                          ELEMENT=ELEMENTS[dtype], FIELDS=FIELDS))
             for dtype, name in NAMES.items()]
    return [*found, variant(segment_bounds_kernel, "segment_bounds",
                            {"bounds": "*i64", "norms": "*fp64", "jobs": "*i64",
                             "segments": "*i64"}, dict(BT=_BLOCK, FIELDS=FIELDS))]

"""Buckets and signs of `reference.sjlt_hash` and `reference.kronecker`, drawn once per call.

What runs of positions hash to is written to a table that all rows and segments read; one launch
draws those of all weights of a call. With runs of 16, it has half a byte per position, so a LoRA
weight's table stays in the caches. The sketch kernels then need one load per number, mostly of a
word that a neighbor loads too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels.jobs import (
    COLUMNS,
    FIELDS,
    FIRST_RUN,
    KEY,
    LEFT_BUCKETS,
    LEFT_LOG2,
    RIGHT_BUCKETS,
    RIGHT_LOG2,
    ROWS,
    RUN_STRIDE,
    RUNS,
    TABLE,
)
from activedpo_fast.kernels.launching import cdiv
from activedpo_fast.kernels.philox import philox4x32
from activedpo_fast.kernels.variants import LAUNCH, Variant, variant
from activedpo_fast.ops.reference import KRONECKER_STREAMS, RUN, SIGNS, SJLT_STREAM, kronecker_sides

_BLOCK = 256
_SJLT = tl.constexpr(SJLT_STREAM)
_LEFT = tl.constexpr(KRONECKER_STREAMS[0])
_RIGHT = tl.constexpr(KRONECKER_STREAMS[1])
_SIGNS = tl.constexpr(SIGNS)


@triton.jit
def _words(block, stream, key):
    """Return the words of Philox blocks of streams: int64 [n] each; uint32 [n]."""
    return philox4x32((block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32),
                      tl.zeros_like(block).to(tl.uint32), stream.to(tl.uint32), key)


@triton.jit
def _word(index, stream, key):
    """Return word index mod 4 of block index // 4."""
    w0, w1, w2, w3 = _words(index >> 2, stream, key)
    low = tl.where((index & 1) == 0, w0, w1)
    high = tl.where((index & 1) == 0, w2, w3)
    return tl.where((index & 2) == 0, low, high)


@triton.jit
def _bucket(word, buckets):
    """Return floor(word buckets / 2^32), int32."""
    return ((word.to(tl.uint64) * buckets.to(tl.uint64)) >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["jobs", "k", "run_log2"])
def draw_runs_kernel(tables, jobs, k: tl.int32, run_log2: tl.int32, BLOCK: tl.constexpr,
                     FIELDS: tl.constexpr):
    """Fill a weight's table, int64 [runs]: a run's bucket, and above it its positions' signs."""
    job = jobs + tl.program_id(1) * FIELDS
    key = tl.load(job + KEY)
    run = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bucket = _bucket(_word(run, tl.zeros_like(run) + _SJLT, key), k)
    position = run << run_log2
    signs = _word(position >> 5, tl.zeros_like(run) + (_SJLT + _SIGNS), key)
    signs = (signs >> (position & 31).to(tl.uint32)) & ((1 << (1 << run_log2)) - 1)
    tl.store(tables + tl.load(job + TABLE) + run, bucket.to(tl.int64) + (signs.to(tl.int64) << 32),
             mask=run < tl.load(job + RUNS))


@triton.jit
def position_hash(table, position, mask, run_log2):
    """Return bucket (int32) and, in its lowest bit, the sign (uint32) of positions.

    Positions are int32 or int64, of any shape. table: as filled by `draw_runs_kernel`.
    """
    place = position & ((1 << run_log2) - 1)
    run = tl.load(table + (position >> run_log2), mask=mask)
    return run.to(tl.int32) ^ place.to(tl.int32), (run >> 32).to(tl.uint32) >> place.to(tl.uint32)


@triton.jit(do_not_specialize=["jobs", "k", "run_log2"])
def draw_sides_kernel(tables, jobs, k: tl.int32, run_log2: tl.int32, BLOCK: tl.constexpr,
                      FIELDS: tl.constexpr):
    """Fill a weight's table, int64 [rows + columns]: a run, and above it a lane, plus 16 if
    negative.

    Place left right_buckets + right of the matrix of `reference.kronecker` is the sum of a row's
    and a column's place. So are, except for a carry, its lane and its run among the buckets' runs.
    """
    job = jobs + tl.program_id(1) * FIELDS
    rows, columns = tl.load(job + ROWS).to(tl.int32), tl.load(job + COLUMNS).to(tl.int32)
    right_buckets = tl.load(job + RIGHT_BUCKETS).to(tl.int32)
    key = tl.load(job + KEY)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = index < rows
    position = tl.where(left, index, index - rows).to(tl.int64)
    stream = tl.where(left, _LEFT, _RIGHT)
    length = tl.where(left, rows, columns)
    buckets = tl.where(left, tl.load(job + LEFT_BUCKETS).to(tl.int32), right_buckets)
    log2 = tl.where(left, tl.load(job + LEFT_LOG2), tl.load(job + RIGHT_LOG2))
    place = _bucket(_word(position >> log2, stream, key), buckets).to(tl.int64)
    place = tl.where(buckets == length, position, place ^ (position & ((1 << log2) - 1)))
    signs = _word(position >> 5, stream + _SIGNS, key) >> (position & 31).to(tl.uint32)

    place = tl.where(left, place * right_buckets, place)
    run = tl.where(left, tl.load(job + FIRST_RUN), 0) + (place >> run_log2) * tl.load(
        job + RUN_STRIDE)
    lane = (place & ((1 << run_log2) - 1)) + 16 * (signs & 1).to(tl.int64)
    tl.store(tables + tl.load(job + TABLE) + index, run % (k >> run_log2) + (lane << 32),
             mask=index < rows + columns)


@triton.jit
def side_hash(table, row, column, mask, rows, k, run_log2, run_stride):
    """Return bucket (int32) and, in its lowest bit, the sign (uint32) of a gradient's entries.

    row, column: int32 of one shape. table: as filled by `draw_sides_kernel`.
    """
    one = tl.load(table + row, mask=mask)
    other = tl.load(table + rows + column, mask=mask)
    runs = k >> run_log2
    run = _wrapped(one.to(tl.int32), other.to(tl.int32), runs)
    one, other = (one >> 32).to(tl.int32), (other >> 32).to(tl.int32)
    lane = (one & 15) + (other & 15)
    run = tl.where((lane >> run_log2) != 0, _wrapped(run, run_stride.to(tl.int32), runs), run)
    return (run << run_log2) | (lane & ((1 << run_log2) - 1)), ((one ^ other) >> 4).to(tl.uint32)


@triton.jit
def signed_by(values, sign):
    """Return values, float32, negated where the lowest bit of sign (uint32) is set."""
    return (values.to(tl.uint32, bitcast=True) ^ (sign << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _wrapped(x, y, limit):
    """Return (x + y) mod limit for numbers below limit, within 31 bits."""
    beyond = x - (limit - y)
    return tl.where(beyond < 0, beyond + limit, beyond)


def run_log2(buckets: int) -> int:
    """Return log2 of W = gcd(buckets, 16)."""
    return math.gcd(buckets, RUN).bit_length() - 1


def position_fields(positions: int, k: int) -> list[int]:
    """Return place RUNS of a job's row for "sjlt": the numbers in its table."""
    return [cdiv(positions, 1 << run_log2(k))]


def side_fields(shape: tuple[int, int], k: int) -> list[int]:
    """Return places LEFT_BUCKETS..RIGHT_LOG2 of a job's row for "kronecker"; its table has
    rows + columns numbers."""
    sides = kronecker_sides(*shape, k)
    return [*sides, *map(run_log2, sides)]


def draw(jobs: Tensor, sizes: Sequence[int], k: int, kronecker: bool) -> Tensor:
    """Return the tables of jobs, one after another; sizes: the numbers in each."""
    tables = torch.empty(sum(sizes), dtype=torch.int64, device=jobs.device)
    kernel = draw_sides_kernel if kronecker else draw_runs_kernel
    kernel[(cdiv(max(sizes), _BLOCK), len(sizes))](
        tables, jobs, k, run_log2(k), BLOCK=_BLOCK, FIELDS=FIELDS, **LAUNCH)
    return tables


def variants() -> list[Variant]:
    return [variant(kernel, name, {"tables": "*i64", "jobs": "*i64"},
                    {"BLOCK": _BLOCK, "FIELDS": FIELDS})
            for kernel, name in ((draw_runs_kernel, "draw_runs"),
                                 (draw_sides_kernel, "draw_sides"))]

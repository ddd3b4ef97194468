"""Buckets and signs of `reference.sjlt_hash` and `reference.kronecker`, drawn once per call.

The words that positions hash to are written to a table that all rows and segments read. With runs
of 16, it has 0.375 bytes per position, so a LoRA weight's table stays in the caches. The sketch
kernels then need two loads per number, mostly of words that a neighbor loads too.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels.launching import signed
from activedpo_fast.kernels.philox import philox4x32
from activedpo_fast.kernels.variants import LAUNCH, Variant
from activedpo_fast.ops.reference import KRONECKER_STREAMS, RUN, SIGNS, SJLT_STREAM, kronecker_place

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


@triton.jit(do_not_specialize=["key", "k", "run_blocks", "blocks"])
def draw_positions_kernel(table, key: tl.int64, k: tl.int32, run_blocks: tl.int64,
                          blocks: tl.int64, BLOCK: tl.constexpr):
    """Fill table, int32 [4 blocks]: runs' buckets from run_blocks blocks, signs from the others."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    of_run = index < run_blocks
    w0, w1, w2, w3 = _words(tl.where(of_run, index, index - run_blocks),
                            tl.where(of_run, _SJLT, _SJLT + _SIGNS), key.to(tl.int64))
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK, 4])
    words = tl.where(of_run[:, None], _bucket(words, k), words.to(tl.int32, bitcast=True))
    tl.store(table + 4 * index[:, None] + tl.arange(0, 4)[None, :], words,
             mask=(index < blocks)[:, None])


@triton.jit
def position_hash(table, run_blocks, position, mask, run_log2):
    """Return bucket (int32) and whether the sign is negative (bool) of positions (int64).

    Positions have any shape. table: as filled by `draw_positions_kernel`.
    """
    bucket = tl.load(table + (position >> run_log2), mask=mask, other=0)
    bucket ^= (position & ((1 << run_log2) - 1)).to(tl.int32)
    signs = tl.load(table + 4 * run_blocks + (position >> 5), mask=mask, other=0)
    return bucket, ((signs >> (position & 31).to(tl.int32)) & 1) != 0


@triton.jit(do_not_specialize=["key", "k", "run_log2", "rows", "columns", "left_buckets",
                               "right_buckets", "left_log2", "right_log2", "first_run",
                               "run_stride"])
def draw_sides_kernel(table, key: tl.int64, k: tl.int32, run_log2: tl.int32, rows: tl.int32,
                      columns: tl.int32, left_buckets: tl.int32, right_buckets: tl.int32,
                      left_log2: tl.int32, right_log2: tl.int32, first_run: tl.int64,
                      run_stride: tl.int64, BLOCK: tl.constexpr):
    """Fill table, int64 [rows + columns]: a run, and above it a lane, plus 16 if negative.

    Place left right_buckets + right of the matrix of `reference.kronecker` is the sum of a row's
    and a column's place. So are, except for a carry, its lane and its run among the buckets' runs.
    """
    key, first_run, run_stride = key.to(tl.int64), first_run.to(tl.int64), run_stride.to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = index < rows
    position = tl.where(left, index, index - rows).to(tl.int64)
    stream = tl.where(left, _LEFT, _RIGHT)
    length = tl.where(left, rows, columns)
    buckets = tl.where(left, left_buckets, right_buckets)
    log2 = tl.where(left, left_log2, right_log2)
    place = _bucket(_word(position >> log2, stream, key), buckets).to(tl.int64)
    place = tl.where(buckets == length, position, place ^ (position & ((1 << log2) - 1)))
    signs = _word(position >> 5, stream + _SIGNS, key) >> (position & 31).to(tl.uint32)

    place = tl.where(left, place * right_buckets, place)
    run = tl.where(left, first_run, 0) + (place >> run_log2) * run_stride
    lane = (place & ((1 << run_log2) - 1)) + 16 * (signs & 1).to(tl.int64)
    tl.store(table + index, run % (k >> run_log2) + (lane << 32), mask=index < rows + columns)


@triton.jit
def side_hash(table, row, column, mask, rows, k, run_log2, run_stride):
    """Return bucket (int32) and whether the sign is negative (bool) of a gradient's entries.

    row, column: int32 of one shape. table: as filled by `draw_sides_kernel`.
    """
    one = tl.load(table + row, mask=mask, other=0)
    other = tl.load(table + rows + column, mask=mask, other=0)
    runs = k >> run_log2
    run = _wrapped(one.to(tl.int32), other.to(tl.int32), runs)
    one, other = (one >> 32).to(tl.int32), (other >> 32).to(tl.int32)
    lane = (one & 15) + (other & 15)
    run = tl.where((lane >> run_log2) != 0, _wrapped(run, run_stride.to(tl.int32), runs), run)
    return (run << run_log2) | (lane & ((1 << run_log2) - 1)), (one >> 4) != (other >> 4)


@triton.jit
def _wrapped(x, y, limit):
    """Return (x + y) mod limit for numbers below limit, within 31 bits."""
    beyond = x - (limit - y)
    return tl.where(beyond < 0, beyond + limit, beyond)


def run_log2(buckets: int) -> int:
    """Return log2 of W = gcd(buckets, 16)."""
    return math.gcd(buckets, RUN).bit_length() - 1


def position_table(positions: int, key: int, k: int, device: torch.device) -> tuple[Tensor, int]:
    """Return the table of positions 0 .. positions-1 for `position_hash`, and its run blocks."""
    run_blocks = triton.cdiv(positions, 4 << run_log2(k))
    blocks = run_blocks + triton.cdiv(positions, 128)
    table = torch.empty(4 * blocks, dtype=torch.int32, device=device)
    draw_positions_kernel[(triton.cdiv(blocks, _BLOCK),)](
        table, signed(key), k, run_blocks, blocks, BLOCK=_BLOCK, **LAUNCH)
    return table, run_blocks


def side_table(rows: int, columns: int, sides: tuple[int, int], key: int, k: int,
               device: torch.device) -> tuple[Tensor, int]:
    """Return the table and the stride for `side_hash`."""
    first_run, run_stride = kronecker_place(key, k)
    table = torch.empty(rows + columns, dtype=torch.int64, device=device)
    draw_sides_kernel[(triton.cdiv(rows + columns, _BLOCK),)](
        table, signed(key), k, run_log2(k), rows, columns, *sides, run_log2(sides[0]),
        run_log2(sides[1]), first_run, run_stride, BLOCK=_BLOCK, **LAUNCH)
    return table, run_stride


def variants() -> list[Variant]:
    return [Variant(kernel, name,
                    {p.name: {"table": table, "BLOCK": "constexpr"}.get(p.name, p.annotation_type)
                     for p in kernel.params},
                    {"BLOCK": _BLOCK}, aligned=("table",))
            for kernel, name, table in ((draw_positions_kernel, "draw_positions", "*i32"),
                                        (draw_sides_kernel, "draw_sides", "*i64"))]

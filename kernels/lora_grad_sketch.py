"""Sketches of gradients of token runs, formed tile by tile on tensor cores.

A program forms one tile of one segment's gradient in float32, reads the hash of its positions
(hashes.py) and adds it to the sums with atomics. Positions of a run have neighboring buckets, so
a warp's atomics go to a few 128-byte segments. Sums are float64, added in whatever order the
hardware chooses, or integers, whose order does not matter (fixed_point.py).

These kernels compile for GPUs and are tested in Triton's interpreter.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels import fixed_point, hashes
from activedpo_fast.kernels.fixed_point import add_numbers, raise_bound, zero_sums
from activedpo_fast.kernels.hashes import (
    position_hash,
    position_table,
    run_log2,
    side_hash,
    side_table,
)
from activedpo_fast.kernels.launching import in_units, on, operand
from activedpo_fast.kernels.variants import LAUNCH, Variant
from activedpo_fast.ops.reference import kronecker_sides


@dataclass(frozen=True)
class Tile:
    """The part of a gradient that a program forms, 64 bytes of tokens at a time."""

    rows: int
    columns: int
    warps: int = 8  # eight numbers per thread
    stages: int = 3


# Wide, tall (with all of the gradient's columns) and square.
TILES = (Tile(16, 128), Tile(32, 64), Tile(128, 16), Tile(64, 32), Tile(64, 64, warps=16))
# Maximum per thread. Without it, ptxas spills a few registers to stay below a round number.
REGISTERS = 80
READY_BLOCK = 1024  # positions of existing rows whose hash is read at a time
READY_GROUP = 8  # existing rows that share it
CHUNK = 1 << 16  # numbers of an existing row per bound
_GRID = 2 ** 31 - 1  # programs in a launch
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def tile_for(rows: int, columns: int) -> Tile:
    """Return the tile of a [rows, columns] gradient: by shape only, because bits depend on it."""
    wide16, wide32, tall16, tall32, square = TILES
    if columns < rows and columns <= 32:
        return tall16 if columns <= 16 else tall32
    if rows <= 32:
        return wide16 if rows <= 16 else wide32
    return square


@triton.jit
def _gradient_tile(left, right, length, top, first, rows, columns, left_step, right_step,
                   BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, OPERAND: tl.constexpr):
    """Return rows from `top` and columns from `first` of left_t right_tᵀ, summed over the tokens.

    Rows of left and right are padded to whole units of 16 bytes (UNIT numbers), and are
    left_step and right_step units apart. OPERAND: the type they are multiplied in.
    """
    BK: tl.constexpr = 4 * UNIT
    token = tl.arange(0, BK)
    row, column = top + tl.arange(0, BM), first + tl.arange(0, BN)
    in_rows = (row < tl.cdiv(rows, UNIT) * UNIT)[:, None]
    in_columns = (column < tl.cdiv(columns, UNIT) * UNIT)[None, :]
    left_at = left + token[None, :] * (left_step * UNIT) + row[:, None]
    right_at = right + token[:, None] * (right_step * UNIT) + column[None, :]
    tile = tl.zeros([BM, BN], tl.float32)
    for t in range(0, length, BK):
        live = t + token < length
        g = tl.load(left_at, mask=in_rows & live[None, :], other=0.0)
        h = tl.load(right_at, mask=live[:, None] & in_columns, other=0.0)
        tile = tl.dot(g.to(OPERAND), h.to(OPERAND), tile, input_precision="ieee")
        left_at += BK * UNIT * left_step
        right_at += BK * UNIT * right_step
    return tile


@triton.jit(do_not_specialize=["sums", "bounds", "segments", "run_blocks", "run_stride", "k",
                               "run_log2", "rows", "columns", "left_step", "right_step",
                               "sums_stride"])
def lora_grad_sketch_kernel(sums, bounds, left, right, segments, table, run_blocks: tl.int64,
                            run_stride: tl.int64, k: tl.int32, run_log2: tl.int32, rows: tl.int32,
                            columns: tl.int32, left_step: tl.int64, right_step: tl.int64,
                            sums_stride: tl.int64, KRONECKER: tl.constexpr, FIXED: tl.constexpr,
                            BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
                            OPERAND: tl.constexpr):
    """Add the tiles of all segments' gradients to their sketches, one tile per program.

    sums: float64, or int64 with `bounds` (FIXED). table: of positions, or of sides (KRONECKER).
    """
    left_step, right_step = left_step.to(tl.int64), right_step.to(tl.int64)
    across = tl.cdiv(columns, BN)
    tiles = tl.cdiv(rows, BM) * across
    segment = segments + 3 * (tl.program_id(0) // tiles).to(tl.int64)
    top = tl.program_id(0) % tiles // across * BM
    first = tl.program_id(0) % across * BN
    start, end, target = tl.load(segment), tl.load(segment + 1), tl.load(segment + 2)
    if start == end:
        return
    tile = _gradient_tile(left + start * left_step * UNIT, right + start * right_step * UNIT,
                          (end - start).to(tl.int32), top, first, rows, columns, left_step,
                          right_step, BM, BN, UNIT, OPERAND)

    # In one dimension, so that neighboring threads have neighboring columns.
    place = tl.arange(0, BM * BN)
    row, column = top + place // BN, first + place % BN
    mask = (row < rows) & (column < columns)
    if KRONECKER:
        bucket, negative = side_hash(table, row, column, mask, rows, k, run_log2, run_stride)
    else:
        bucket, negative = position_hash(table, run_blocks, row.to(tl.int64) * columns + column,
                                         mask, run_log2)
    tile = tl.reshape(tile, [BM * BN])
    add_numbers(sums + target * sums_stride.to(tl.int64), bucket, tl.where(negative, -tile, tile),
                mask, bounds, target, FIXED)


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


@triton.jit(do_not_specialize=["tokens", "rows", "columns", "left_step", "right_step"])
def token_norms_kernel(norms, left, right, tokens: tl.int64, rows: tl.int32, columns: tl.int32,
                       left_step: tl.int64, right_step: tl.int64, UNIT: tl.constexpr,
                       BT: tl.constexpr, BC: tl.constexpr):
    """norms[t] = |left_t| |right_t|, the norm of a token's part of the gradient."""
    left_step, right_step = left_step.to(tl.int64), right_step.to(tl.int64)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    one = _squared_norms(left, left_step, rows, token, tokens, UNIT, BT, BC)
    other = _squared_norms(right, right_step, columns, token, tokens, UNIT, BT, BC)
    tl.store(norms + token, tl.sqrt(one * other), mask=token < tokens)


@triton.jit(do_not_specialize=["bounds", "segments", "rows", "columns"])
def segment_bounds_kernel(bounds, norms, segments, rows: tl.int32, columns: tl.int32,
                          BT: tl.constexpr):
    """Bound each segment's numbers by the gradient's sum of absolute values, whatever the buckets.

    It is at most sqrt(rows columns) times the gradient's norm (Cauchy-Schwarz).
    """
    segment = segments + 3 * tl.program_id(0).to(tl.int64)
    start, end, row = tl.load(segment), tl.load(segment + 1), tl.load(segment + 2)
    if start == end:
        return
    total = tl.zeros([BT], tl.float64)
    for t in range(0, (end - start).to(tl.int32), BT):
        token = start + t + tl.arange(0, BT)
        total += tl.load(norms + token, mask=token < end, other=0.0)
    size = rows.to(tl.float64) * columns.to(tl.float64)
    raise_bound(bounds, row, tl.sum(total, 0) * tl.sqrt(size))


@triton.jit(do_not_specialize=["bounds", "x", "length", "x_stride"])
def ready_bounds_kernel(bounds, x, length: tl.int64, x_stride: tl.int64, CHUNK: tl.constexpr,
                        BLOCK: tl.constexpr):
    """Bound each CHUNK numbers of each row by their sum of absolute values."""
    length, x_stride = length.to(tl.int64), x_stride.to(tl.int64)
    chunks = tl.cdiv(length, CHUNK)
    row = tl.program_id(0) // chunks
    begin = tl.program_id(0) % chunks * CHUNK
    total = tl.zeros([BLOCK], tl.float64)
    for step in range(0, CHUNK, BLOCK):
        position = begin + step + tl.arange(0, BLOCK)
        total += tl.abs(tl.load(x + row * x_stride + position, mask=position < length,
                                other=0.0)).to(tl.float64)
    raise_bound(bounds, row, tl.sum(total, 0))


@triton.jit(do_not_specialize=["sums", "bounds", "x", "run_blocks", "n", "length", "k", "x_stride",
                               "run_log2"])
def sjlt_rows_kernel(sums, bounds, x, table, run_blocks: tl.int64, n: tl.int32, length: tl.int64,
                     k: tl.int32, x_stride: tl.int64, run_log2: tl.int32, FIXED: tl.constexpr,
                     GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Add BLOCK positions of GROUP rows of x to sums [n, k]; their hash is read once."""
    length, x_stride = length.to(tl.int64), x_stride.to(tl.int64)
    blocks = tl.cdiv(length, BLOCK)
    origin = tl.program_id(0) % blocks * BLOCK
    first_row = tl.program_id(0) // blocks * GROUP
    position = origin + tl.arange(0, BLOCK)
    mask = position < length
    bucket, negative = position_hash(table, run_blocks, position, mask, run_log2)
    for row in range(first_row, tl.minimum(first_row + GROUP, n)):
        values = tl.load(x + row * x_stride + position, mask=mask, other=0.0)
        add_numbers(sums + row * k.to(tl.int64), bucket, tl.where(negative, -values, values), mask,
                    bounds, row, FIXED)


def lora_grad_sketch(out: Tensor, left: Tensor, right: Tensor, segments: Tensor, key: int,
                     method: str, deterministic: bool) -> None:
    """out[row] += the sketch of each segment's gradient, `reference.outer_sketch`.

    Args:
        out: float64 [n, k], its rows contiguous.
        left, right: [N, rows], [N, columns], float32, bfloat16 or float16, their rows contiguous,
            on out's device. Products are summed in float32. Rows that are not 16-byte aligned, or
            not a multiple of 16 bytes long, are copied first.
        segments: int64 [S, 3] on the CPU. key: 0 <= key < 2^64. method: "sjlt" or "kronecker".
        deterministic: the same bits on every run, whatever the other rows and segments and their
            order; a row with a number that is not finite (or overflows float32) becomes NaN.
            This costs another read of left and right, and n k int64 numbers. Otherwise the
            hardware determines the order of additions, and with it the last bits.
    """
    tokens, rows, columns = len(left), left.shape[1], right.shape[1]
    n, k = out.shape
    if tokens == 0 or len(segments) == 0:
        return
    left, right = in_units(left), in_units(right)
    unit = 16 // left.element_size()
    steps = left.stride(0) // unit, right.stride(0) // unit
    tile = tile_for(rows, columns)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    with on(out.device):
        on_device = _segments_on(segments, out.device)
        if method == "kronecker":
            sides = kronecker_sides(rows, columns, k)
            table, run_stride = side_table(rows, columns, sides, key, k, out.device)
            run_blocks = 0
        else:
            table, run_blocks = position_table(rows * columns, key, k, out.device)
            run_stride = 0
        sums, bounds = zero_sums(n, k, out.device) if deterministic else (out, None)
        if bounds is not None:
            norms = torch.empty(tokens, dtype=torch.float64, device=out.device)
            token_norms_kernel[(triton.cdiv(tokens, 4),)](
                norms, left, right, tokens, rows, columns, *steps, UNIT=unit, BT=4, BC=512,
                **LAUNCH)
            segment_bounds_kernel[(len(segments),)](
                bounds, norms, on_device, rows, columns, BT=256, **LAUNCH)
        for part in on_device.split(max(1, _GRID // tiles)):
            lora_grad_sketch_kernel[(tiles * len(part),)](
                sums, bounds, left, right, part, table, run_blocks, run_stride, k, run_log2(k),
                rows, columns, *steps, sums.stride(0), KRONECKER=method == "kronecker",
                FIXED=deterministic, BM=tile.rows, BN=tile.columns, UNIT=unit,
                OPERAND=operand(left.dtype), num_warps=tile.warps, num_stages=tile.stages,
                maxnreg=REGISTERS, **LAUNCH)
        if bounds is not None:
            fixed_point.finish(out, sums, bounds)


def sjlt_rows(out: Tensor, x: Tensor, key: int, deterministic: bool) -> None:
    """out += S x, the sketch of `reference.sjlt`.

    Args:
        out: float32 [n, k]. x: float32 [n, D]. Rows of both are contiguous.
        key, deterministic: as for `lora_grad_sketch`.

    Summed in fixed point or float64, and added to out once; needs n k numbers of 8 bytes.
    """
    n, length = x.shape
    k = out.shape[1]
    if n == 0 or length == 0:
        return
    with on(out.device):
        table, run_blocks = position_table(length, key, k, out.device)
        if deterministic:
            sums, bounds = zero_sums(n, k, out.device)
            ready_bounds_kernel[(n * triton.cdiv(length, CHUNK),)](
                bounds, x, length, x.stride(0), CHUNK=CHUNK, BLOCK=READY_BLOCK,
                **LAUNCH)
        else:
            sums, bounds = torch.zeros(n, k, dtype=torch.float64, device=out.device), None
        sjlt_rows_kernel[(triton.cdiv(length, READY_BLOCK) * triton.cdiv(n, READY_GROUP),)](
            sums, bounds, x, table, run_blocks, n, length, k, x.stride(0), run_log2(k),
            FIXED=deterministic, GROUP=READY_GROUP, BLOCK=READY_BLOCK, **LAUNCH)
        if bounds is not None:
            fixed_point.finish(out, sums, bounds)
        else:
            out += sums.to(out.dtype)


def variants() -> list[Variant]:
    """Return every kernel that this module launches, in every configuration."""
    found = []
    for dtype, name in _DTYPES.items():
        unit = 16 // dtype.itemsize
        for tile, kronecker, fixed in product(TILES, (False, True), (True, False)):
            found.append(_variant(
                lora_grad_sketch_kernel,
                f"lora_grad_sketch {'kronecker' if kronecker else 'sjlt'} {name} {tile.rows}x"
                f"{tile.columns} {'deterministic' if fixed else 'fast'}",
                {"left": f"*{name}", "right": f"*{name}", "segments": "*i64",
                 "table": "*i64" if kronecker else "*i32"},
                dict(KRONECKER=kronecker, FIXED=fixed, BM=tile.rows, BN=tile.columns,
                     UNIT=unit, OPERAND=operand(dtype)),
                tile.warps, tile.stages, REGISTERS))
        found.append(_variant(
            token_norms_kernel, f"token_norms {name}",
            {"norms": "*fp64", "left": f"*{name}", "right": f"*{name}"},
            dict(UNIT=unit, BT=4, BC=512)))
    found += [_variant(segment_bounds_kernel, "segment_bounds",
                       {"bounds": "*i64", "norms": "*fp64", "segments": "*i64"}, dict(BT=256)),
              _variant(ready_bounds_kernel, "ready_bounds", {"bounds": "*i64", "x": "*fp32"},
                       dict(CHUNK=CHUNK, BLOCK=READY_BLOCK))]
    found += [_variant(sjlt_rows_kernel, f"sjlt_rows {'deterministic' if fixed else 'fast'}",
                       {"x": "*fp32", "table": "*i32"},
                       dict(FIXED=fixed, GROUP=READY_GROUP, BLOCK=READY_BLOCK))
              for fixed in (True, False)]
    return found + hashes.variants() + fixed_point.variants()


def _variant(kernel: Any, name: str, pointers: dict[str, str], constants: dict[str, Any],
             warps: int = 4, stages: int = 3, registers: int | None = None) -> Variant:
    if "FIXED" in constants:
        pointers = {"sums": "*i64", "bounds": "*i64"} | pointers
        if not constants["FIXED"]:
            del pointers["bounds"]
            pointers["sums"] = "*fp64"
            constants = {"bounds": None} | constants
    signature = {p.name: "constexpr" if p.name in constants else
                 pointers.get(p.name, p.annotation_type) for p in kernel.params}
    aligned = tuple(p.name for p in kernel.params
                    if p.name in pointers and not p.do_not_specialize)
    return Variant(kernel, name, signature, constants, warps, stages, aligned, registers)


# The segments copied last: all layers of a backward pass use the same ones.
_copied: tuple[weakref.ref[Tensor], Any, Tensor] | None = None


def _segments_on(segments: Tensor, device: torch.device) -> Tensor:
    """Return the segments on the device, copied without waiting for it."""
    global _copied
    if device.type != "cuda":
        return segments.contiguous()
    if segments.is_inference():  # it does not track changes
        return segments.contiguous().pin_memory().to(device, non_blocking=True)
    state = segments._version, device, torch.cuda.current_stream(device)
    if _copied is not None and _copied[0]() is segments and _copied[1] == state:
        return _copied[2]
    copy = segments.contiguous().pin_memory().to(device, non_blocking=True)
    _copied = weakref.ref(segments), state, copy
    return copy

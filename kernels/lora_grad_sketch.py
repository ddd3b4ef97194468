"""Sketches of gradients of token runs, formed tile by tile on tensor cores, weight after weight.

A program forms one tile of one run's gradient of one weight in float32, reads the hash of its
positions (hashes.py) and adds it to the sums with atomics. Positions of a run have neighboring
buckets, so a warp's atomics go to a few 128-byte segments. Sums are float64, added in whatever
order the hardware chooses, or integers, whose order does not matter (fixed_point.py).

One launch works through a group of weights (jobs.py): launching is what a hook on every layer would
spend its time on.

float32 operands are multiplied as bfloat16 pieces. Three hold float32's 24 bits; of the nine
products of pieces, the six whose sum is within 2^-22 of the exact product are added up, the
smallest first. An operand that a bfloat16 model wrote is its own first piece.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels import fixed_point, hashes
from activedpo_fast.kernels.fixed_point import add_numbers, zero_sums
from activedpo_fast.kernels.gradient_bounds import raise_bounds
from activedpo_fast.kernels.hashes import position_hash, run_log2, side_hash, signed_by
from activedpo_fast.kernels.jobs import (
    COLUMNS,
    FIELDS,
    LEFT,
    LEFT_STEP,
    RIGHT,
    RIGHT_STEP,
    ROWS,
    RUN_STRIDE,
    TABLE,
    Form,
    on_device,
    operand_at,
)
from activedpo_fast.kernels.launching import ELEMENTS, NAMES, cdiv, on, operand
from activedpo_fast.kernels.variants import LAUNCH, Variant, variant
from activedpo_fast.ops.layout import signed
from activedpo_fast.ops.reference import kronecker_place


@dataclass(frozen=True)
class Tile:
    """The part of a gradient that a program forms, some tokens at a time."""

    rows: int
    columns: int
    warps: int
    tokens: int = 32
    stages: int = 3


# Wide, tall (with all of the gradient's columns) and square, chosen by time on an H100; float32's
# square is smaller, as it has two sums.
NARROW = (Tile(16, 128, 4), Tile(32, 64, 4), Tile(128, 16, 4), Tile(64, 32, 4))
SQUARE = {torch.float32: Tile(128, 64, 8), torch.bfloat16: Tile(128, 128, 8),
          torch.float16: Tile(128, 128, 8)}
REGISTERS = 128  # per thread, so that a multiprocessor has 16 warps
_GRID = 2 ** 31 - 1  # programs in a launch's first dimension
_JOBS = 2 ** 16 - 1  # and in its second
_PART = tl.constexpr(2048)


def tile_for(rows: int, columns: int, dtype: torch.dtype) -> Tile:
    """Return the tile of a [rows, columns] gradient: by these only, because bits depend on it."""
    wide16, wide32, tall16, tall32 = NARROW
    if columns < rows and columns <= 32:
        return tall16 if columns <= 16 else tall32
    if rows <= 32:
        return wide16 if rows <= 16 else wide32
    return SQUARE[dtype]


@triton.jit
def _pieces(x, OPERAND: tl.constexpr):
    """Return three bfloat16 blocks that sum to x, float32, as OPERAND; inf and NaN stay."""
    first = x.to(tl.bfloat16)
    x = tl.where(first.to(tl.float32) == x, 0.0, x - first.to(tl.float32))
    second = x.to(tl.bfloat16)
    third = (x - second.to(tl.float32)).to(tl.bfloat16)
    return first.to(OPERAND), second.to(OPERAND), third.to(OPERAND)


@triton.jit
def _add_product(tile, small, g, h, SPLIT: tl.constexpr, OPERAND: tl.constexpr):
    """Return tile + the product g h of the first pieces, small + the products of the others.

    Tensor cores truncate what they add to a sum, so numbers far below the sum are added up apart.
    """
    if SPLIT:
        g1, g2, g3 = _pieces(g, OPERAND)
        h1, h2, h3 = _pieces(h, OPERAND)
        small = tl.dot(g2, h2, small, input_precision="ieee")
        small = tl.dot(g3, h1, small, input_precision="ieee")
        small = tl.dot(g1, h3, small, input_precision="ieee")
        small = tl.dot(g2, h1, small, input_precision="ieee")
        small = tl.dot(g1, h2, small, input_precision="ieee")
        return tl.dot(g1, h1, tile, input_precision="ieee"), small
    else:
        return tl.dot(g.to(OPERAND), h.to(OPERAND), tile, input_precision="ieee"), small


@triton.jit
def _gradient_tile(left, right, length, top, first, rows, columns, left_step, right_step,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
                   SPLIT: tl.constexpr, OPERAND: tl.constexpr):
    """Return rows from `top` and columns from `first` of left_t right_tᵀ, summed over the tokens.

    Rows of left and right are padded to whole units of 16 bytes (UNIT numbers), and are
    left_step and right_step units apart. OPERAND: the type they, or their pieces (SPLIT), are
    multiplied in.
    """
    token = tl.arange(0, BK)
    row, column = top + tl.arange(0, BM), first + tl.arange(0, BN)
    in_rows = (row < tl.cdiv(rows, UNIT) * UNIT)[:, None]
    in_columns = (column < tl.cdiv(columns, UNIT) * UNIT)[None, :]
    left_at = left + token[None, :] * (left_step * UNIT) + row[:, None]
    right_at = right + token[:, None] * (right_step * UNIT) + column[None, :]
    tile = tl.zeros([BM, BN], tl.float32)
    small = tl.zeros([BM, BN], tl.float32)
    for t in range(0, length, BK):
        live = t + token < length
        g = tl.load(left_at, mask=in_rows & live[None, :], other=0.0)
        h = tl.load(right_at, mask=live[:, None] & in_columns, other=0.0)
        tile, small = _add_product(tile, small, g, h, SPLIT, OPERAND)
        left_at += BK * UNIT * left_step
        right_at += BK * UNIT * right_step
    return tile + small if SPLIT else tile


@triton.jit
def _add_tile(sums, bounds, target, tile, top, first, rows, columns, table, job, k, run_log2,
              WHOLE: tl.constexpr, KRONECKER: tl.constexpr, FIXED: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr):
    """Add a tile to a sketch, _PART numbers at a time: hashes of more would not fit the registers.

    WHOLE: all of it lies in the gradient, so that nothing is masked, which costs a branch a number.
    """
    if BM * BN > _PART:
        one, other = tl.split(tl.trans(tl.reshape(tile, [BM, 2, BN // 2]), 0, 2, 1))
        _add_tile(sums, bounds, target, one, top, first, rows, columns, table, job, k, run_log2,
                  WHOLE, KRONECKER, FIXED, BM, BN // 2)
        _add_tile(sums, bounds, target, other, top, first + BN // 2, rows, columns, table, job, k,
                  run_log2, WHOLE, KRONECKER, FIXED, BM, BN // 2)
    else:
        # In one dimension, so that neighboring threads have neighboring columns.
        place = tl.arange(0, BM * BN)
        row, column = top + place // BN, first + place % BN
        mask = None if WHOLE else (row < rows) & (column < columns)
        if KRONECKER:
            bucket, sign = side_hash(table, row, column, mask, rows, k, run_log2,
                                     tl.load(job + RUN_STRIDE))
        else:
            # Counted from the tile's first row, a position fits in 32 bits.
            origin = top.to(tl.int64) * columns
            start = origin >> run_log2
            position = (origin - (start << run_log2)).to(tl.int32) + (
                (row - top) * columns + column)
            bucket, sign = position_hash(table + start, position, mask, run_log2)
        tile = signed_by(tl.reshape(tile, [BM * BN]), sign)
        add_numbers(sums, bucket, tile, mask, bounds, target, FIXED)


@triton.jit(do_not_specialize=["sums", "bounds", "jobs", "segments", "count", "k", "run_log2",
                               "sums_stride"])
def lora_grad_sketch_kernel(sums, bounds, jobs, tables, segments, count: tl.int32, k: tl.int32,
                            run_log2: tl.int32, sums_stride: tl.int64, KRONECKER: tl.constexpr,
                            FIXED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                            BK: tl.constexpr, UNIT: tl.constexpr, ELEMENT: tl.constexpr,
                            OPERAND: tl.constexpr, FIELDS: tl.constexpr):
    """Add the tiles of `count` segments' gradients to their sketches, one tile per program.

    The second dimension of the grid is over jobs; the first has the tiles of the largest.
    sums: float64, or int64 with `bounds` (FIXED). tables: of positions, or of sides (KRONECKER).
    """
    job = jobs + tl.program_id(1) * FIELDS
    rows, columns = tl.load(job + ROWS).to(tl.int32), tl.load(job + COLUMNS).to(tl.int32)
    across = tl.cdiv(columns, BN)
    tiles = tl.cdiv(rows, BM) * across
    segment = tl.program_id(0) // tiles
    if segment >= count:
        return
    segments += 3 * segment.to(tl.int64)
    top = tl.program_id(0) % tiles // across * BM
    first = tl.program_id(0) % across * BN
    start, end, target = tl.load(segments), tl.load(segments + 1), tl.load(segments + 2)
    if start == end:
        return
    left_step, right_step = tl.load(job + LEFT_STEP), tl.load(job + RIGHT_STEP)
    tile = _gradient_tile(operand_at(job, LEFT, ELEMENT) + start * left_step * UNIT,
                          operand_at(job, RIGHT, ELEMENT) + start * right_step * UNIT,
                          (end - start).to(tl.int32), top, first, rows, columns, left_step,
                          right_step, BM, BN, BK, UNIT, ELEMENT == tl.float32, OPERAND)

    sums += target * sums_stride.to(tl.int64)
    table = tables + tl.load(job + TABLE)
    if (top + BM <= rows) & (first + BN <= columns):
        _add_tile(sums, bounds, target, tile, top, first, rows, columns, table, job, k, run_log2,
                  True, KRONECKER, FIXED, BM, BN)
    else:
        _add_tile(sums, bounds, target, tile, top, first, rows, columns, table, job, k, run_log2,
                  False, KRONECKER, FIXED, BM, BN)


@dataclass
class _Group:
    """Weights of one tile, dtype and number of tokens, whose rows in the table are adjacent."""

    tile: Tile
    dtype: torch.dtype
    tokens: int
    tiles: int = 0  # of the largest gradient
    rows: list[list[int]] = field(default_factory=list)  # of the table
    sizes: list[int] = field(default_factory=list)  # numbers of hashes that each has

    def add(self, sums: Tensor, bounds: Tensor | None, jobs: Tensor, tables: Tensor,
            segments: Tensor, kronecker: bool) -> None:
        """Add the sketches of all segments, int64 [S, 3] on the device, in one launch or few.

        jobs: its rows of the table, on the device. tables: the hashes of all groups.
        """
        tile, dtype, k = self.tile, self.dtype, sums.shape[1]
        for part in segments.split(max(1, _GRID // self.tiles)):
            lora_grad_sketch_kernel[(self.tiles * len(part), len(jobs))](
                sums, bounds, jobs, tables, part, len(part), k, run_log2(k),
                sums.stride(0), KRONECKER=kronecker, FIXED=bounds is not None, BM=tile.rows,
                BN=tile.columns, BK=tile.tokens, UNIT=16 // dtype.itemsize,
                ELEMENT=ELEMENTS[dtype], OPERAND=_multiplied_in(dtype), FIELDS=FIELDS,
                num_warps=tile.warps, num_stages=tile.stages, maxnreg=REGISTERS, **LAUNCH)


def _multiplied_in(dtype: torch.dtype) -> Any:
    return operand(torch.bfloat16 if dtype == torch.float32 else dtype)


def lora_grad_sketches(out: Tensor, weights: Sequence[tuple[Tensor, Tensor, int]],
                       segments: Tensor, method: str, deterministic: bool) -> None:
    """out[row] += the sketches of each segment's gradients, `reference.outer_sketch`, of weights.

    Args:
        out: float64 [n, k], its rows contiguous.
        weights: of each, (left [N, rows], right [N, columns], key), 0 <= key < 2^64. left and right
            are float32, bfloat16 or float16, their rows contiguous, on out's device. Products are
            summed in float32. Rows that are not 16-byte aligned, or not a multiple of 16 bytes
            long, are copied first.
        segments: int64 [S, 3] on the CPU. method: "sjlt" or "kronecker".
        deterministic: the same bits on every run, whatever the other rows and segments and their
            order; a row with a number that is not finite (or overflows float32) becomes NaN.
            This costs another read of left and right, and n k int64 numbers. Otherwise the
            hardware determines the order of additions, and with it the last bits.
    """
    if len(segments) == 0:
        return
    kronecker, k = method == "kronecker", out.shape[1]
    copies: list[Tensor] = []
    with on(out.device):
        there = _segments_on(segments, out.device)
        work = []
        for begin in range(0, len(weights), _JOBS):
            groups = _grouped(weights[begin:begin + _JOBS], k, kronecker, copies)
            if groups:
                work += _prepared(groups, k, kronecker, out.device)
        if not deterministic:
            for group, jobs, tables in work:
                group.add(out, None, jobs, tables, there, kronecker)
            return
        sums, bounds = zero_sums(len(out), k, out.device)
        for group, jobs, _ in work:
            raise_bounds(bounds, jobs, group.dtype, group.tokens, there)
        for group, jobs, tables in work:
            group.add(sums, bounds, jobs, tables, there, kronecker)
        fixed_point.finish(out, sums, bounds)


def _prepared(groups: Sequence[_Group], k: int, kronecker: bool,
              device: torch.device) -> list[tuple[_Group, Tensor, Tensor]]:
    """Return each group with its rows of the table and the hashes, drawn together."""
    table = on_device([row for group in groups for row in group.rows], device)
    sizes = [size for group in groups for size in group.sizes]
    tables = hashes.draw(table, sizes, k, kronecker)
    parts = table.split([len(group.rows) for group in groups])
    return [(group, jobs, tables) for group, jobs in zip(groups, parts, strict=True)]


def _grouped(weights: Sequence[tuple[Tensor, Tensor, int]], k: int, kronecker: bool,
             copies: list[Tensor]) -> list[_Group]:
    """Return the weights in groups. What depends on their form alone is worked out once for each.

    copies: keeps those of operands that rows of the table point to.
    """
    groups: dict[tuple[Tile, torch.dtype, int], _Group] = {}
    forms: dict[tuple[Any, ...], tuple[_Group, Form, list[int], int]] = {}
    begin = 0
    for left, right, key in weights:
        kind = left.shape, left.stride(), right.shape, right.stride(), left.dtype
        if kind not in forms:
            forms[kind] = _form(left, right, groups, k, kronecker)
        group, form, hashing, size = forms[kind]
        if not group.tokens:
            continue
        row = form.fields(left, right, copies)
        row += begin, signed(key), *hashing
        if kronecker:
            row += kronecker_place(key, k)
        group.rows.append(row)
        group.sizes.append(size)
        begin += size
    return [group for group in groups.values() if group.rows]


def _form(left: Tensor, right: Tensor, groups: dict[tuple[Tile, torch.dtype, int], _Group], k: int,
          kronecker: bool) -> tuple[_Group, Form, list[int], int]:
    """Return the group of a form of weights, the form, the places of its row after KEY that do not
    depend on the key, and the numbers of hashes."""
    form, dtype = Form.of(left, right), left.dtype
    rows, columns = form.rows, form.columns
    tile = tile_for(rows, columns, dtype)
    group = groups.setdefault((tile, dtype, len(left)), _Group(tile, dtype, len(left)))
    group.tiles = max(group.tiles, cdiv(rows, tile.rows) * cdiv(columns, tile.columns))
    if kronecker:
        return group, form, hashes.side_fields((rows, columns), k), rows + columns
    hashing = hashes.position_fields(rows * columns, k)
    return group, form, hashing, hashing[0]


def variants() -> list[Variant]:
    """Return every kernel that this module launches, in every configuration."""
    found = []
    for dtype, name in NAMES.items():
        tiles = (*NARROW, SQUARE[dtype])
        for tile, kronecker, fixed in product(tiles, (False, True), (True, False)):
            found.append(variant(
                lora_grad_sketch_kernel,
                f"lora_grad_sketch {'kronecker' if kronecker else 'sjlt'} {name} {tile.rows}x"
                f"{tile.columns} {'deterministic' if fixed else 'fast'}",
                {"jobs": "*i64", "tables": "*i64", "segments": "*i64"},
                dict(KRONECKER=kronecker, FIXED=fixed, BM=tile.rows, BN=tile.columns,
                     BK=tile.tokens, UNIT=16 // dtype.itemsize, ELEMENT=ELEMENTS[dtype],
                     OPERAND=_multiplied_in(dtype), FIELDS=FIELDS),
                tile.warps, tile.stages, REGISTERS))
    return found


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
    last = _copied  # read once: another thread may replace it
    if last is not None and last[0]() is segments and last[1] == state:
        return last[2]
    copy = segments.contiguous().pin_memory().to(device, non_blocking=True)
    _copied = weakref.ref(segments), state, copy
    return copy

"""Projection by random signs of gradients of token runs, and of existing rows (Triton).

The matrix is that of `reference.rademacher`: its bits are functions of where they are used, so they
are the same as on the CPU and on every GPU.

Projecting n rows costs n D k multiply-adds and D k random signs; forming their gradients costs a
small part of that, once. So the work proceeds in slabs, a part of every row's gradient at a time:

1. `form_slab_kernel` forms it in float32 and writes it as a sum of bfloat16 pieces.
2. `project_slab_kernel` multiplies it by signs generated in registers. A program has 128 columns of
   the matrix, one Philox block per position, for up to 128 rows. The signs are the left operand of
   its `tl.dot`s, in the layout that tensor cores read from registers: in the code compiled for
   Hopper, only their random bits, 16 bytes per position, pass through shared memory.
3. `add_partials_kernel` adds the programs' sums to `out` in float64, always in the same order.

There are no atomic adds: the same input gives the same bits on every run of one kind of GPU.

Accuracy. bfloat16 has float32's exponents, so pieces of small numbers are as accurate as pieces of
large ones: three of them hold float32's 24 bits, two hold 17, which is enough if left and right
are bfloat16 or float16. A sign is exact, and so is its product with a piece. Tensor cores truncate
their sums instead of rounding them to nearest (H. Ootomo, R. Yokota, "Recovering single precision
accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022), so they
sum over 128 positions at most. These sums are added in float32 over a few thousand positions, and
in float64 beyond that.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels.launching import NAMES, cdiv, in_units, on, operand
from activedpo_fast.kernels.philox import random_words
from activedpo_fast.kernels.slabs import GRADIENT_TILES, TILES, gradient_tile_for, parts, tile_for
from activedpo_fast.kernels.variants import LAUNCH, Variant
from activedpo_fast.ops.layout import signed

_STREAM = tl.constexpr(2)  # reference.RADEMACHER_STREAM
_COLUMNS = 128  # columns of the matrix per program: a Philox block
_SLAB_BYTES = 1 << 26
_ROWS = 1024  # rows that share a slab; more would gain nothing
_TOKENS = {torch.bfloat16: 32, torch.float16: 32, torch.float32: 16}  # multiplied at a time


@triton.jit
def _store_pieces(at, x, piece_stride, mask, PIECES: tl.constexpr):
    """Store x, float32, as bfloat16 pieces that sum to it, piece_stride numbers apart."""
    for piece in tl.static_range(PIECES):
        part = x.to(tl.bfloat16)
        tl.store(at + piece * piece_stride, part, mask=mask)
        part = part.to(tl.float32)
        x = tl.where(part == x, 0.0, x - part)  # infinity minus itself would be NaN


@triton.jit(do_not_specialize=["row_blocks", "piece_blocks", "plan_rows", "left_step", "right_step",
                               "rows", "columns", "top", "height", "begin", "width", "length",
                               "tiles", "tiles_across"])
def form_slab_kernel(slab, row_blocks: tl.int64, piece_blocks: tl.int64, plan, plan_rows: tl.int32,
                     left, left_step: tl.int64, right, right_step: tl.int64, rows: tl.int32,
                     columns: tl.int32, top: tl.int32, height: tl.int32, begin: tl.int32,
                     width: tl.int32, length: tl.int32, tiles: tl.int32, tiles_across: tl.int32,
                     A: tl.constexpr, B: tl.constexpr, TOKENS: tl.constexpr, UNIT: tl.constexpr,
                     PIECES: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr):
    """Form a tile [A, B] of one row's part of a slab, a part of `height` rows of `width` numbers.

    It starts at row 16 `top` and column 16 `begin` of the gradient. Beyond the part or the
    gradient, up to `length` numbers, zeros are written. Rows of left and right are left_step and
    right_step units of UNIT numbers apart, and consist of whole units.
    """
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    a = tile // tiles_across * A + tl.arange(0, A)
    c = tile % tiles_across * B + tl.arange(0, B)
    left_stride, right_stride = left_step.to(tl.int64) * UNIT, right_step.to(tl.int64) * UNIT
    spans = plan + 2 * plan_rows + 1
    sums = tl.zeros([A, B], tl.float32)
    for segment in range(tl.load(plan + plan_rows + row), tl.load(plan + plan_rows + row + 1)):
        start = tl.load(spans + 2 * segment)
        count = (tl.load(spans + 2 * segment + 1) - start).to(tl.int32)
        left_at = left + start * left_stride + (top * 16 + a)[None, :]
        right_at = right + start * right_stride + (begin * 16 + c)[None, :]
        has_a = (top * 16 + a < tl.cdiv(rows, UNIT) * UNIT)[None, :]
        has_c = (begin * 16 + c < tl.cdiv(columns, UNIT) * UNIT)[None, :]
        for first in range(0, count, TOKENS):
            t = first + tl.arange(0, TOKENS)
            has_t = (t < count)[:, None]
            t = t.to(tl.int64)[:, None]
            g = tl.load(left_at + t * left_stride, mask=has_t & has_a, other=0.0)
            h = tl.load(right_at + t * right_stride, mask=has_t & has_c, other=0.0)
            sums = tl.dot(tl.trans(g.to(OPERAND)), h.to(OPERAND), sums, input_precision="ieee")
    inside = (a < height)[:, None] & (begin * 16 + c < columns)[None, :]
    index = a[:, None] * width + c[None, :]  # a slab of a row is below 2^20 numbers
    _store_pieces(slab + row * row_blocks * BLOCK + index, tl.where(inside, sums, 0.0),
                  piece_blocks * BLOCK, (c < width)[None, :] & (index < length), PIECES)


@triton.jit(do_not_specialize=["row_blocks", "piece_blocks", "x", "x_stride", "begin", "columns",
                               "length", "tiles"])
def copy_slab_kernel(slab, row_blocks: tl.int64, piece_blocks: tl.int64, x, x_stride: tl.int64,
                     begin: tl.int64, columns: tl.int64, length: tl.int32, tiles: tl.int32,
                     B: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """Copy numbers begin.. of one row of x, then zeros up to `length` numbers."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles) * B + tl.arange(0, B)
    position = begin.to(tl.int64) + i
    numbers = tl.load(x + row * x_stride + position, mask=position < columns, other=0.0)
    _store_pieces(slab + row * row_blocks * BLOCK + i, numbers, piece_blocks * BLOCK, i < length,
                  PIECES)


@triton.jit
def _signs(position, column_block, key, POSITIONS: tl.constexpr):
    """Return the signs of 128 columns at some positions, bfloat16 [128, POSITIONS].

    Two adjacent positions share a 32-bit register, so that a shift and a mask produce two signs.
    The bits are paired first, while there are few of them.
    """
    word0, word1, word2, word3 = random_words(position, column_block, _STREAM, key)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    pairs = tl.trans(tl.reshape(words, [POSITIONS // 2, 2, 4]), 0, 2, 1)
    even, odd = tl.split(pairs)  # [POSITIONS / 2, 4]
    halves = tl.join((even & 0xFFFF) | (odd << 16), (even >> 16) | (odd & 0xFFFF0000))
    halves = tl.trans(tl.reshape(halves, [POSITIONS // 2, 8]))  # 16 columns each
    shift = 15 - tl.arange(0, 16).to(tl.uint32)
    ones = ((halves[:, None, :] << shift[None, :, None]) & 0x80008000) | 0x3F803F80
    ones = tl.reshape(ones, [128, POSITIONS // 2])
    ones = tl.join((ones & 0xFFFF).to(tl.uint16), (ones >> 16).to(tl.uint16))
    return tl.reshape(ones, [128, POSITIONS]).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["row_blocks", "piece_blocks", "first", "pitch", "run", "chunk",
                               "blocks", "key"])
def project_slab_kernel(partials, slab, row_blocks: tl.int64, piece_blocks: tl.int64,
                        first: tl.int64, pitch: tl.int64, run: tl.int32, chunk: tl.int32,
                        blocks: tl.int32, key: tl.int64, ROWS: tl.constexpr, PIECES: tl.constexpr,
                        BLOCK: tl.constexpr, OPERAND: tl.constexpr):
    """partials[split, column, row] = the split's positions of ROWS rows times their signs.

    The slab has `blocks` blocks of numbers, `chunk` per split. Each run of `run` blocks is
    contiguous in the gradient; the first starts at position `first`, the next `pitch` later.
    """
    key, first, pitch = key.to(tl.int64), first.to(tl.int64), pitch.to(tl.int64)
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)
    at = slab + row.to(tl.int64)[:, None] * (row_blocks * BLOCK) + i[None, :]
    sums = tl.zeros([128, ROWS], tl.float32)
    for block in range(split * chunk, tl.minimum(split * chunk + chunk, blocks)):
        position = first + block // run * pitch + block % run * BLOCK + i
        signs = _signs(position, tl.program_id(0), key, BLOCK).to(OPERAND)
        here = at + block * BLOCK
        products = tl.dot(signs, tl.trans(tl.load(here)).to(OPERAND))
        for _ in tl.static_range(1, PIECES):
            here += piece_blocks * BLOCK
            products = tl.dot(signs, tl.trans(tl.load(here)).to(OPERAND), products)
        sums += products
    column = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    column += split.to(tl.int64) * tl.num_programs(0) * 128
    tl.store(partials + column[:, None] * (tl.num_programs(2) * ROWS) + row[None, :], sums)


@triton.jit(do_not_specialize=["out", "out_stride", "rows", "k", "row_groups", "split_groups",
                               "splits"])
def add_partials_kernel(out, out_stride: tl.int64, plan, rows: tl.int32, k: tl.int32, partials,
                        row_groups: tl.int64, split_groups: tl.int64, splits: tl.int32,
                        K: tl.constexpr, ROWS: tl.constexpr):
    """out[plan[row]] += the sum of all splits, divided by sqrt(k).

    A column of partials has row_groups * ROWS numbers; a split has split_groups * ROWS.
    """
    column = tl.program_id(0) * K + tl.arange(0, K)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split_stride = split_groups.to(tl.int64) * ROWS
    at = partials + column.to(tl.int64)[:, None] * (row_groups * ROWS) + row[None, :]
    has_column = column < k
    sums = tl.zeros([K, ROWS], tl.float64)
    for split in range(splits):
        part = tl.load(at + split * split_stride, mask=has_column[:, None], other=0.0)
        sums += part.to(tl.float64)
    sums = tl.trans(sums / tl.sqrt(k.to(tl.float64)))
    number = tl.load(plan + row, mask=row < rows, other=0)
    target = out + number[:, None] * out_stride + column[None, :]
    has = (row < rows)[:, None] & has_column[None, :]
    tl.store(target, tl.load(target, mask=has) + sums, mask=has)


_COPIED, _ADDED = 1024, (64, 32)  # blocks of copy_slab_kernel and add_partials_kernel


class _Projection:
    """The projection of some rows of `length` numbers, slab by slab, added to rows of `out`.

    plan: int64 on the device; it starts with the row numbers in out.
    """

    def __init__(self, out: Tensor, plan: Tensor, rows: int, length: int, pieces: int,
                 key: int) -> None:
        self.out, self.plan, self.rows, self.pieces = out, plan, rows, pieces
        self.key = signed(key)
        shared, processors = _device_limits(out.device)
        self.tile = tile_for(rows, pieces, shared)
        self.grid_rows = cdiv(rows, self.tile.rows)
        padded_rows = self.grid_rows * self.tile.rows
        self.grid_columns = cdiv(out.shape[1], _COLUMNS)
        # Four programs per multiprocessor fill it evenly, whether it runs one or two at a time.
        self.splits = max(1, 4 * processors // (self.grid_columns * self.grid_rows))
        block = self.tile.block
        most = min(self.splits * 8192, _SLAB_BYTES // (2 * pieces * padded_rows))
        self.positions = min(most // block, cdiv(length, block)) * block
        self.splits = min(self.splits, self.positions // block)
        self.slab = torch.empty(pieces, padded_rows, self.positions, dtype=torch.bfloat16,
                                device=out.device)
        self.partials = torch.empty(self.splits, self.grid_columns * _COLUMNS, padded_rows,
                                    dtype=torch.float32, device=out.device)

    @property
    def strides(self) -> tuple[int, int]:
        """Strides of rows and of pieces of the slab, in blocks."""
        block = self.tile.block
        return self.slab.stride(1) // block, self.slab.stride(0) // block

    def padded(self, length: int) -> int:
        rounded: int = cdiv(length, self.tile.block) * self.tile.block
        return rounded

    def add(self, first: int, pitch: int, run: int, length: int) -> None:
        """Project the slab's `length` numbers: runs of `run` numbers, `pitch` positions apart."""
        tile = self.tile
        blocks = length // tile.block
        chunk = cdiv(blocks, self.splits)
        splits = cdiv(blocks, chunk)
        project_slab_kernel[(self.grid_columns, splits, self.grid_rows)](
            self.partials, self.slab, *self.strides, first, pitch, run // tile.block, chunk, blocks,
            self.key, ROWS=tile.rows, PIECES=self.pieces, BLOCK=tile.block,
            OPERAND=operand(torch.bfloat16), num_warps=tile.warps, num_stages=tile.stages,
            **LAUNCH)
        columns, rows = _ADDED
        grid = (cdiv(self.out.shape[1], columns), cdiv(self.rows, rows))
        add_partials_kernel[grid](
            self.out, self.out.stride(0), self.plan, self.rows, self.out.shape[1], self.partials,
            self.partials.stride(1) // rows, self.partials.stride(0) // rows, splits, K=columns,
            ROWS=rows, **LAUNCH)


def lora_grad_rademacher(out: Tensor, left: Tensor, right: Tensor, segments: Tensor,
                         key: int) -> None:
    """out[row] += the Rademacher sketch of each segment's gradient, as `ops.outer_sketch_`.

    Args:
        out: float64 [n, k], unit column stride. left: [N, rows], right: [N, columns], of one dtype:
            float32, bfloat16 or float16, unit column strides, on out's device.
        segments: int64 [S, 3] on the CPU, of (start, end, row); they may overlap and share rows.
        key: 0 <= key < 2^64.

    Arguments are not checked, and nothing waits for the GPU. Definition: `reference.outer_sketch`.
    """
    segments = segments[segments[:, 1] > segments[:, 0]]
    segments = segments[torch.sort(segments[:, 2], stable=True).indices]
    numbers, counts = torch.unique_consecutive(segments[:, 2], return_counts=True)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    with on(out.device):
        for begin in range(0, len(numbers), _ROWS):
            end = min(begin + _ROWS, len(numbers))
            bounds = first[begin:end + 1]
            _add_gradients(out, left, right, numbers[begin:end], bounds - bounds[0],
                           segments[bounds[0]:bounds[-1], :2], key)


def _add_gradients(out: Tensor, left: Tensor, right: Tensor, numbers: Tensor, first: Tensor,
                   spans: Tensor, key: int) -> None:
    plan = torch.cat([numbers, first, spans.flatten()]).to(out.device, non_blocking=True)
    rows, columns, count = left.shape[1], right.shape[1], len(numbers)
    pieces = 3 if left.dtype == torch.float32 else 2
    left, right = in_units(left), in_units(right)
    unit = 16 // left.element_size()
    projection = _Projection(out, plan, count, rows * columns, pieces, key)
    a, b = gradient_tile_for(rows, columns)
    for part in parts(rows, columns, projection.positions, projection.tile.block):
        length = projection.padded(part.height * part.width)
        # Rows that contain only the padding of whole rows count too.
        across = cdiv(part.width, b)
        tiles = cdiv(cdiv(length, part.width), a) * across
        form_slab_kernel[(tiles * count,)](
            projection.slab, *projection.strides, plan, count, left, left.stride(0) // unit, right,
            right.stride(0) // unit, rows, columns, part.top // 16, part.height, part.begin // 16,
            part.width, length, tiles, across, A=a, B=b, TOKENS=_TOKENS[left.dtype], UNIT=unit,
            PIECES=pieces, BLOCK=projection.tile.block, OPERAND=operand(left.dtype), **LAUNCH)
        projection.add(part.top * columns + part.begin, columns,
                       length if part.whole else part.width, length)


def rademacher_rows(out: Tensor, x: Tensor, key: int) -> None:
    """out += the Rademacher sketch of each row of x, as `ops.rademacher_`.

    Args:
        out: float32 [n, k], unit column stride. x: float32 [n, D], likewise, on out's device.
        key: 0 <= key < 2^64.

    The sums are formed separately and added to out once. Arguments are not checked, and nothing
    waits for the GPU. Definition: `reference.rademacher`.
    """
    if x.numel() == 0:
        return
    with on(out.device):
        for begin in range(0, len(x), _ROWS):
            rows = x[begin:begin + _ROWS]
            count, columns = rows.shape
            sums = torch.zeros(count, out.shape[1], dtype=torch.float64, device=out.device)
            plan = torch.arange(count, device=out.device)
            projection = _Projection(sums, plan, count, columns, 3, key)
            for part in parts(1, columns, projection.positions, projection.tile.block):
                length = projection.padded(part.width)
                tiles = cdiv(length, _COPIED)
                copy_slab_kernel[(tiles * count,)](
                    projection.slab, *projection.strides, rows, rows.stride(0), part.begin, columns,
                    length, tiles, B=_COPIED, PIECES=3, BLOCK=projection.tile.block, **LAUNCH)
                projection.add(part.begin, columns, length, length)
            out[begin:begin + _ROWS] += sums


def _device_limits(device: torch.device) -> tuple[int, int]:
    """Return shared memory per block in bytes, and multiprocessors; an H100's if interpreted."""
    if device.type != "cuda":
        return 232448, 132
    limits = torch.cuda.get_device_properties(device)
    shared = getattr(limits, "shared_memory_per_block_optin", 99 << 10)
    return shared, limits.multi_processor_count


def variants() -> list[Variant]:
    """Every configuration of every kernel here."""
    found = []
    for (dtype, name), (a, b) in product(NAMES.items(), GRADIENT_TILES):
        found.append(_variant(
            form_slab_kernel, f"lora_grad_rademacher form {name} {a}x{b}",
            {"slab": "*bf16", "plan": "*i64", "left": f"*{name}", "right": f"*{name}"},
            dict(A=a, B=b, TOKENS=_TOKENS[dtype], UNIT=16 // dtype.itemsize,
                 PIECES=3 if dtype == torch.float32 else 2, BLOCK=128, OPERAND=operand(dtype)),
            ("slab", "plan", "left", "right")))
    found.append(_variant(copy_slab_kernel, "lora_grad_rademacher copy",
                          {"slab": "*bf16", "x": "*fp32"}, dict(B=_COPIED, PIECES=3, BLOCK=128),
                          ("slab",)))
    for pieces, tiles in TILES.items():
        for tile in tiles:
            found.append(_variant(
                project_slab_kernel,
                f"lora_grad_rademacher project {tile.rows} rows {pieces} pieces",
                {"partials": "*fp32", "slab": "*bf16"},
                dict(ROWS=tile.rows, PIECES=pieces, BLOCK=tile.block,
                     OPERAND=operand(torch.bfloat16)),
                ("partials", "slab"), tile.warps, tile.stages))
    found.append(_variant(add_partials_kernel, "lora_grad_rademacher add",
                          {"out": "*fp64", "plan": "*i64", "partials": "*fp32"},
                          dict(K=_ADDED[0], ROWS=_ADDED[1]), ("plan", "partials")))
    return found


def _variant(kernel: Any, name: str, pointers: dict[str, str], constants: dict[str, Any],
             aligned: tuple[str, ...], warps: int = 4, stages: int = 3) -> Variant:
    signature = {
        parameter.name: "constexpr" if parameter.name in constants
        else pointers.get(parameter.name, parameter.annotation_type)
        for parameter in kernel.params}
    return Variant(kernel, name, signature, constants, warps, stages, aligned)

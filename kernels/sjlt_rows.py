"""The sparse sketch of existing rows (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels import fixed_point
from activedpo_fast.kernels.fixed_point import add_numbers, raise_bound, zero_sums
from activedpo_fast.kernels.hashes import draw, position_fields, position_hash, run_log2, signed_by
from activedpo_fast.kernels.jobs import KEY, on_device
from activedpo_fast.kernels.launching import cdiv, on
from activedpo_fast.kernels.variants import LAUNCH, Variant, variant
from activedpo_fast.ops.layout import signed

READY_BLOCK = 1024  # positions whose hash is read at a time
READY_GROUP = 8  # rows that share it
CHUNK = 1 << 16  # numbers of a row per bound


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


@triton.jit(do_not_specialize=["sums", "bounds", "x", "n", "length", "k", "x_stride",
                               "run_log2"])
def sjlt_rows_kernel(sums, bounds, x, table, n: tl.int32, length: tl.int64,
                     k: tl.int32, x_stride: tl.int64, run_log2: tl.int32, FIXED: tl.constexpr,
                     GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Add BLOCK positions of GROUP rows of x to sums [n, k]; their hash is read once."""
    length, x_stride = length.to(tl.int64), x_stride.to(tl.int64)
    blocks = tl.cdiv(length, BLOCK)
    origin = tl.program_id(0) % blocks * BLOCK
    first_row = tl.program_id(0) // blocks * GROUP
    position = origin + tl.arange(0, BLOCK)
    mask = position < length
    bucket, sign = position_hash(table, position, mask, run_log2)
    for row in range(first_row, tl.minimum(first_row + GROUP, n)):
        values = tl.load(x + row * x_stride + position, mask=mask, other=0.0)
        add_numbers(sums + row * k.to(tl.int64), bucket, signed_by(values, sign), mask,
                    bounds, row, FIXED)


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
        runs, = fields = position_fields(length, k)
        jobs = on_device([[0] * KEY.value + [signed(key), *fields]], out.device)
        table = draw(jobs, [runs], k, kronecker=False)
        if deterministic:
            sums, bounds = zero_sums(n, k, out.device)
            ready_bounds_kernel[(n * cdiv(length, CHUNK),)](
                bounds, x, length, x.stride(0), CHUNK=CHUNK, BLOCK=READY_BLOCK,
                **LAUNCH)
        else:
            sums, bounds = torch.zeros(n, k, dtype=torch.float64, device=out.device), None
        sjlt_rows_kernel[(cdiv(length, READY_BLOCK) * cdiv(n, READY_GROUP),)](
            sums, bounds, x, table, n, length, k, x.stride(0), run_log2(k),
            FIXED=deterministic, GROUP=READY_GROUP, BLOCK=READY_BLOCK, **LAUNCH)
        if bounds is not None:
            fixed_point.finish(out, sums, bounds)
        else:
            out += sums.to(out.dtype)


def variants() -> list[Variant]:
    return [variant(ready_bounds_kernel, "ready_bounds", {"bounds": "*i64", "x": "*fp32"},
                    dict(CHUNK=CHUNK, BLOCK=READY_BLOCK)),
            *(variant(sjlt_rows_kernel, f"sjlt_rows {'deterministic' if fixed else 'fast'}",
                      {"x": "*fp32", "table": "*i64"},
                      dict(FIXED=fixed, GROUP=READY_GROUP, BLOCK=READY_BLOCK))
              for fixed in (True, False))]

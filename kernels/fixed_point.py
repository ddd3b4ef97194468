"""Sums of float32 numbers that are the same in any order: integer multiples of a power of two.

A row of sums is int64, in units of 2^-e. e comes from a bound on the row's sums, so that they fit
in 62 bits: the rounding of a number is about 2^-62 of the bound. Integers are added by atomics,
whose order then does not matter. A row's bound is a float64 stored as its bits. They sort like the
numbers, so atomics find the largest bound too.

`bounds` is int64 [n, 2]: the largest of a row's bounds, and the number of bounds. An infinite or
NaN bound makes the row NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels.launching import cdiv
from activedpo_fast.kernels.variants import LAUNCH, Variant

BLOCK = 1024
_INFINITE = tl.constexpr(0x7FF << 52)


@triton.jit
def raise_bound(bounds, row, bound):
    """Add a bound (float64) to a row."""
    bits = bound.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF  # without the sign of a NaN
    tl.atomic_max(bounds + 2 * row, bits, sem="relaxed")
    tl.atomic_add(bounds + 2 * row + 1, 1, sem="relaxed")


@triton.jit
def add_numbers(target, bucket, values, mask, bounds, row, FIXED: tl.constexpr):
    """target[bucket] += values (float32 [m]), in fixed point with the row's unit or in float64.

    mask: which of them; None for all.
    """
    if FIXED:
        finite = tl.abs(values) < float("inf")
        unit = _power_of_two(_exponent(bounds, row))
        scaled = tl.where(finite, values, 0.0).to(tl.float64) * unit
        nearest = (scaled + tl.where(values < 0, -0.5, 0.5)).to(tl.int64)
        tl.atomic_add(target + bucket, nearest, mask=mask, sem="relaxed")
        infinite = finite == 0 if mask is None else mask & (finite == 0)
        tl.atomic_max(bounds + 2 * row + tl.zeros_like(bucket), tl.zeros_like(nearest) + _INFINITE,
                      mask=infinite, sem="relaxed")
    else:
        tl.atomic_add(target + bucket, values.to(tl.float64), mask=mask, sem="relaxed")


@triton.jit
def _exponent(bounds, row):
    """Return e such that the row's bound times 2^e is below 2^62."""
    bound = tl.load(bounds + 2 * row).to(tl.float64, bitcast=True) * tl.load(
        bounds + 2 * row + 1).to(tl.float64)
    e = 61 - ((bound.to(tl.int64, bitcast=True) >> 52 & 0x7FF) - 1023)
    return tl.minimum(e, 1000)  # a bound of zero: there is nothing to add


@triton.jit
def _power_of_two(e):
    return ((e + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["out", "sums", "bounds", "out_stride", "k"])
def finish_kernel(out, sums, bounds, out_stride: tl.int64, k: tl.int64, BLOCK: tl.constexpr):
    """out [n, k] += sums times their rows' units; rows without a bound are unchanged."""
    out_stride, k = out_stride.to(tl.int64), k.to(tl.int64)
    tiles = tl.cdiv(k, BLOCK)
    row = tl.program_id(0) // tiles
    bound = tl.load(bounds + 2 * row)
    if bound == 0:
        return
    bucket = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = bucket < k
    total = tl.load(sums + row * k + bucket, mask=mask).to(tl.float64)
    total *= _power_of_two(-_exponent(bounds, row))
    total = tl.where(bound < _INFINITE, total, float("nan"))
    at = out + row * out_stride + bucket
    tl.store(at, tl.load(at, mask=mask) + total.to(out.dtype.element_ty), mask=mask)


def zero_sums(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return int64 zeros: sums [n, k] and bounds [n, 2]."""
    both = torch.zeros(n * (k + 2), dtype=torch.int64, device=device)
    return both[:n * k].view(n, k), both[n * k:].view(n, 2)


def finish(out: Tensor, sums: Tensor, bounds: Tensor) -> None:
    """out += sums; out is float64 or float32 [n, k]."""
    n, k = out.shape
    finish_kernel[(n * cdiv(k, BLOCK),)](
        out, sums, bounds, out.stride(0), k, BLOCK=BLOCK, **LAUNCH)


def variants() -> list[Variant]:
    return [Variant(finish_kernel, f"finish {dtype}",
                    {"out": f"*{dtype}", "sums": "*i64", "bounds": "*i64", "out_stride": "i64",
                     "k": "i64", "BLOCK": "constexpr"},
                    {"BLOCK": BLOCK})
            for dtype in ("fp64", "fp32")]

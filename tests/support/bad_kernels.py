"""Kernels with faults that benchmarks.gpu.kernel_resources must find, and one without."""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

from activedpo_fast.kernels.variants import Variant


@triton.jit
def product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """out [M, N] = a [M, K] times b [K, N]"""
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + i[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + j[None, :])
    tl.store(out + i[:, None] * N + j[None, :], tl.dot(x, y))


@triton.jit
def odd_range(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), 1.0)


class Fatal:
    """A constant that ends the process of the compiler, as a failed assertion in the compiler
    does."""

    def __str__(self) -> str:
        os._exit(1)


def variants() -> list[Variant]:
    """In the order in which the test expects them."""
    return [
        _product("right", 64, 64, 32, num_warps=4),
        _product("spills", 128, 128, 16, num_warps=1),
        _product("large", 256, 32, 512, num_warps=16),
        Variant(odd_range, "refused", {"out": "*fp32", "N": "constexpr"}, {"N": 3}),
        Variant(odd_range, "fatal", {"out": "*fp32", "N": "constexpr"}, {"N": Fatal()}),
        Variant(odd_range, "after it", {"out": "*fp32", "N": "constexpr"}, {"N": 4}),
    ]


def _product(name: str, m: int, n: int, k: int, **options: Any) -> Variant:
    signature = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
    return Variant(
        product,
        name,
        signature | dict.fromkeys("MNK", "constexpr"),
        {"M": m, "N": n, "K": k},
        **options,
        aligned=tuple(signature),
    )

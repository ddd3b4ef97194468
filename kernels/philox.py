"""Philox4x32-10 on the GPU: the random bits of `reference.philox4x32`, generated in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, key):
    """Return random words of counters (c0, c1, c2, c3): uint32 blocks of one shape; key: int64.

    The four uint32 blocks are bitwise equal to the CPU's and the reference's.
    """
    key_lo = (key & 0xFFFFFFFF).to(tl.uint32)
    key_hi = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ key_lo
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ key_hi
        c3 = a.to(tl.uint32)
        key_lo = wrapping_add(key_lo, 0x9E3779B9)
        key_hi = wrapping_add(key_hi, 0xBB67AE85)
    return c0, c1, c2, c3


@triton.jit
def wrapping_add(x, constant: tl.constexpr):
    """Return x + constant modulo 2^32 (in 64 bits: the interpreter reports a wrap as overflow)."""
    return ((x.to(tl.uint64) + constant) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def random_words(block, column, stream: tl.constexpr, key):
    """Return words 0..3 of Philox blocks; block: int64, column: int64 or int32, of one shape."""
    zero = tl.zeros_like(block)
    return philox4x32((block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32),
                      (column + zero).to(tl.uint32), (zero + stream).to(tl.uint32), key)

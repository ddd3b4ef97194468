"""Tensors and keys as the compiled code accepts them."""

from __future__ import annotations

from torch import Tensor


def rows_together(x: Tensor) -> Tensor:
    """Return x, or a copy of it if its rows are not contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def signed(key: int) -> int:
    """Return the int64 with the bits of a 64-bit key."""
    return key - 2**64 if key >= 2**63 else key

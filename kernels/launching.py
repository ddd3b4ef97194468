"""What the host functions of the kernels have in common: where and what is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels import interpreted


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches inside go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def operand(dtype: torch.dtype) -> Any:
    """What tiles of a dtype are multiplied in: their own type, where there is one for it."""
    if dtype == torch.bfloat16 and interpreted():
        return tl.float32  # NumPy has no bfloat16; every bfloat16 is a float32
    return getattr(tl, str(dtype).removeprefix("torch."))


def in_units(x: Tensor) -> Tensor:
    """x, or a copy of it padded by zeros, whose rows can be read in pieces of 16 bytes."""
    unit = 16 // x.element_size()
    width = x.shape[1]
    if width % unit == 0 and x.stride(0) % unit == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(len(x), triton.cdiv(width, unit) * unit)
    padded[:, :width] = x
    return padded


def signed(key: int) -> int:
    """The int64 that has the bits of a 64-bit key."""
    return key - 2**64 if key >= 2**63 else key

"""Helpers shared by the kernels' host functions: device, operand type, row layout, key."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels import interpreted

if interpreted():
    from activedpo_fast.kernels.interpreting import accept_numpy_2_4

    accept_numpy_2_4()

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # as Triton's
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up. Triton's own function takes microseconds outside of kernels."""
    return -(-a // b)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context whose launches go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def operand(dtype: torch.dtype) -> Any:
    """Return the type that tiles of a dtype are multiplied in: their own type, if available."""
    if dtype == torch.bfloat16 and interpreted():
        return tl.float32  # NumPy has no bfloat16; every bfloat16 is a float32
    return getattr(tl, str(dtype).removeprefix("torch."))


def in_units(x: Tensor) -> Tensor:
    """Return x, or a zero-padded copy of it, whose rows can be read in pieces of 16 bytes."""
    unit = 16 // x.element_size()
    width = x.shape[1]
    if width % unit == 0 and x.stride(0) % unit == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(len(x), cdiv(width, unit) * unit)
    padded[:, :width] = x
    return padded

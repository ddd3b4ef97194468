"""Where a matrix is in a safetensors file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple, NoReturn

import torch

from activedpo_fast.errors import ActiveDPOError

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_HEADER_LIMIT = 100_000_000  # bytes; safetensors has the same


class MatrixLayout(NamedTuple):
    """The place of a matrix in a file: consecutive rows from the byte `begin` on."""

    begin: int
    rows: int
    dim: int
    dtype: torch.dtype


def read_layout(
    path: Path, size: int, read: Callable[[int, int], bytes], tensor: str
) -> MatrixLayout:
    """Find a matrix in a safetensors file, without trusting its header.

    The format: the header's length as a little-endian uint64, the header in JSON, the data.

    Args:
        size: of the file, in bytes.
        read: returns so many bytes from an offset of the file on: read(offset, count).

    Raises:
        ActiveDPOError: the file is not a complete one, or has no such floating-point matrix.
    """

    def refuse(why: str) -> NoReturn:
        raise ActiveDPOError(f"{path} is not a whole safetensors file of rows: {why}")

    if size < 8:
        refuse(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", read(0, 8))
    if not 0 < length <= min(size - 8, _HEADER_LIMIT):
        refuse(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(read(8, length).decode("utf-8"))
    except (ValueError, RecursionError):
        refuse("its header is not JSON")
    entry = header.get(tensor) if isinstance(header, dict) else None
    if not isinstance(entry, dict):
        refuse(f"no tensor {tensor!r} in it")
    dtype = _DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        refuse(
            f"{tensor!r} has the dtype {short(entry.get('dtype'))}, not one of {', '.join(_DTYPES)}"
        )
    shape, offsets = _two_sizes(entry.get("shape")), _two_sizes(entry.get("data_offsets"))
    if shape is None or shape[1] == 0:
        refuse(f"{tensor!r} has the shape {short(entry.get('shape'))}, not that of rows")
    if offsets is None or offsets[1] - offsets[0] != shape[0] * shape[1] * dtype.itemsize:
        refuse(
            f"{tensor!r} has the shape {list(shape)} and the data offsets "
            f"{short(entry.get('data_offsets'))}"
        )
    begin = 8 + length
    if begin + offsets[1] > size:
        refuse(f"{tensor!r} ends at byte {begin + offsets[1]} of {size}")
    return MatrixLayout(begin + offsets[0], shape[0], shape[1], dtype)


def _two_sizes(value: Any) -> tuple[int, int] | None:
    """Return two numbers of a header if they are sizes within the range of int64."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    if not all(type(number) is int and 0 <= number < 2**63 for number in value):
        return None
    return value[0], value[1]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Groups of weights that one launch works through: a table on the device says what each is.

A row of the table, int64 [FIELDS], has the addresses of a weight's two operands and all that
differs from weight to weight. So a launch's time on the CPU does not grow with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels.launching import in_units

FIELDS = 16
# Places in a row.
LEFT = tl.constexpr(0)  # address of left [N, rows], whose rows have whole units of 16 bytes
RIGHT = tl.constexpr(1)  # of right [N, columns], likewise
LEFT_STEP = tl.constexpr(2)  # units from a row of left to the next
RIGHT_STEP = tl.constexpr(3)
ROWS = tl.constexpr(4)
COLUMNS = tl.constexpr(5)
TABLE = tl.constexpr(6)  # where its hashes begin in the group's table
KEY = tl.constexpr(7)
RUNS = tl.constexpr(8)  # "sjlt": runs of positions that share a draw of the bucket
LEFT_BUCKETS = tl.constexpr(8)  # "kronecker": the sides that it is projected to,
RIGHT_BUCKETS = tl.constexpr(9)
LEFT_LOG2 = tl.constexpr(10)  # their runs' logarithms,
RIGHT_LOG2 = tl.constexpr(11)
FIRST_RUN = tl.constexpr(12)  # and where `reference.kronecker_place` puts them
RUN_STRIDE = tl.constexpr(13)


@dataclass(frozen=True)
class Form:
    """The layout of a weight's operands: left [N, rows] and right [N, columns], rows contiguous."""

    rows: int
    columns: int
    steps: tuple[int, int] | None  # LEFT_STEP, RIGHT_STEP; None: rows are not whole units

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Form:
        unit = 16 // left.element_size()
        numbers = *left.shape[1:], *right.shape[1:], left.stride(0), right.stride(0)
        whole = all(number % unit == 0 for number in numbers)
        steps = (left.stride(0) // unit, right.stride(0) // unit) if whole else None
        return cls(left.shape[1], right.shape[1], steps)

    def fields(self, left: Tensor, right: Tensor, copies: list[Tensor]) -> list[int]:
        """Return the places up to COLUMNS of a weight's row.

        Operands that are not of whole units are copied first: `copies` keeps these.
        """
        at, other, steps = left.data_ptr(), right.data_ptr(), self.steps
        if steps is None or (at | other) % 16:
            left, right = in_units(left), in_units(right)
            copies += left, right
            unit = 16 // left.element_size()
            at, other = left.data_ptr(), right.data_ptr()
            steps = left.stride(0) // unit, right.stride(0) // unit
        return [at, other, *steps, self.rows, self.columns]


def on_device(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    """Return the table of the rows, which have the same first places, int64 [P, FIELDS].

    It is copied without waiting for the device.
    """
    row_bytes = 8 * FIELDS
    numbers = bytearray(row_bytes * len(rows))
    pack = Struct(f"{len(rows[0])}q").pack_into
    for i, row in enumerate(rows):
        pack(numbers, i * row_bytes, *row)
    table = torch.frombuffer(numbers, dtype=torch.int64).view(-1, FIELDS)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
def operand_at(job, FIELD: tl.constexpr, ELEMENT: tl.constexpr):
    """Return the pointer to an operand's first row."""
    return tl.multiple_of(tl.load(job + FIELD).to(tl.pointer_type(ELEMENT)), 16)

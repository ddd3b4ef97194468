"""Groups of weights that one launch works through: a table on the device says what each is.

A row of the table, int64 [FIELDS], has the addresses of a weight's two operands and all that
differs from weight to weight. So a launch's time on the CPU does not grow with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
class Job:
    """One weight's gradients: sums of left_t right_tᵀ."""

    left: Tensor  # [N, rows] or wider: its rows have whole units of 16 bytes
    right: Tensor  # [N, columns] likewise
    shape: tuple[int, int]  # of the weight
    key: int

    @classmethod
    def of(cls, left: Tensor, right: Tensor, key: int) -> Job:
        return cls(in_units(left), in_units(right), (left.shape[1], right.shape[1]), key)

    def fields(self) -> list[int]:
        """The first places of its row."""
        unit = 16 // self.left.element_size()
        return [self.left.data_ptr(), self.right.data_ptr(), self.left.stride(0) // unit,
                self.right.stride(0) // unit, *self.shape]


def on_device(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the table of the rows, int64 [P, FIELDS], copied without waiting for the device."""
    table = torch.zeros(len(rows), FIELDS, dtype=torch.int64)
    table[:, :len(rows[0])] = torch.tensor(rows)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
def operand_at(job, FIELD: tl.constexpr, ELEMENT: tl.constexpr):
    """Return the pointer to an operand's first row."""
    return tl.multiple_of(tl.load(job + FIELD).to(tl.pointer_type(ELEMENT)), 16)

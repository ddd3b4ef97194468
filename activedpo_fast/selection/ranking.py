"""The result of a strategy: candidate pairs, best first."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Ranking(NamedTuple):
    """Chosen candidate pairs, best first.

    indices: int64 [n] into the pairs. scores: float64 [n], at the time of the pick.
    touched: int64 [n], rows read for each pick (counting repeats), after the first scores, which
        read every row once; None if a strategy does not keep scores.
    """

    indices: Tensor
    scores: Tensor
    touched: Tensor | None = None

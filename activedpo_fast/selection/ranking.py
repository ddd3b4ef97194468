"""What a strategy answers: candidate pairs, best first."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Ranking(NamedTuple):
    """Chosen candidate pairs, best first.

    indices: int64 [n] into the pairs. scores: float64 [n], as they were at the pick.
    touched: int64 [n], rows that were looked at for each pick (repeatedly or not), after the first
        scores, which take every row once; None where a strategy does not keep scores.
    """

    indices: Tensor
    scores: Tensor
    touched: Tensor | None = None

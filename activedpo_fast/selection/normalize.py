"""Response rows as features of pairs: normalised, and never all formed at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.signals import check_pairs

Normalize = Literal["response", "pair"] | None

_CHUNK_BYTES = 2**26  # float64 bytes of the rows or features that are worked on at once
_COPY_BYTES = 2**30  # up to here a float64 copy of all rows is kept, for speed


class PairFeatures:
    """The features phi of N pairs (a, b) of R response rows g, formed only where they are needed.

    `normalize` says what phi is:
      * "response": g_a/|g_a| - g_b/|g_b|;
      * "pair": (g_a - g_b)/|g_a - g_b|;
      * None: g_a - g_b.
    A row or difference that is zero stays zero.

    Args:
        rows: [R, k], any floating dtype. Features and sums are float64; the rows stay as they are
            stored, but for a float64 copy while that is no more than 1 GiB.
        pairs: int64 [N, 2] of row numbers.

    Attributes:
        dim: k.
        size: float64 [N], what the rounding of `at` is relative to, 2.2e-16 * size.
        reach: float64 [N], what the rounding of `dot` is relative to: the sum of the two parts'
            norms, which may be much larger than |phi|.

    Raises:
        ActiveDPOError: rows that are not finite (by number), pairs that do not fit, an unknown
            `normalize`.
    """

    def __init__(self, rows: Tensor, pairs: Tensor, normalize: Normalize) -> None:
        check_normalize(normalize)
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ActiveDPOError(f"rows must be a floating-point matrix [R, k], not {rows.dtype} "
                                 f"{list(rows.shape)}")
        check_pairs(pairs, len(rows), "pairs")
        self.dim = rows.shape[1]
        self.device = rows.device
        self._first, self._second = pairs.to(rows.device).unbind(1)
        self._chunk = max(1, _CHUNK_BYTES // (8 * max(1, self.dim)))
        self._rows = rows.to(torch.float64) if 8 * rows.numel() <= _COPY_BYTES else rows

        norms = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in self._row_chunks()])
        _check_finite(norms)
        by_response = normalize == "response"
        self._row_divisor = _nonzero(norms) if by_response else torch.ones_like(norms)
        self._pair_divisor = norms.new_ones(len(pairs))
        row_sizes = norms / self._row_divisor
        self.reach = row_sizes[self._first] + row_sizes[self._second]
        if by_response:
            self.size = self.reach
            return
        # Not normalised by row: the difference is one rounding per entry, however small it is.
        everything = torch.arange(len(self), device=self.device)
        lengths = [torch.linalg.vector_norm(phi, dim=1) for phi in self.chunks(everything)]
        self.size = torch.cat([norms[:0], *lengths])
        if normalize == "pair":
            self._pair_divisor = _nonzero(self.size)
            self.size = self.size / self._pair_divisor
            self.reach = self.reach / self._pair_divisor

    def __len__(self) -> int:
        return len(self._first)

    def at(self, indices: Tensor) -> Tensor:
        """The features of the pairs numbered `indices`, int64 [m]: float64 [m, k]."""
        difference = self._normalized(self._first[indices]) - self._normalized(
            self._second[indices]
        )
        return difference / self._pair_divisor[indices, None]

    def chunks(self, indices: Tensor) -> Iterator[Tensor]:
        """The features of `indices` in order, a bounded number at a time: float64 [m, k] each."""
        for part in indices.split(self._chunk):
            yield self.at(part)

    def dot(self, w: Tensor) -> Tensor:
        """phi . w of every pair, w float64 [k] -> float64 [N]: one product for each response."""
        per_row = torch.cat([part @ w for part in self._row_chunks()]) / self._row_divisor
        return (per_row[self._first] - per_row[self._second]) / self._pair_divisor

    def _normalized(self, numbers: Tensor) -> Tensor:
        return self._rows[numbers].to(torch.float64) / self._row_divisor[numbers, None]

    def _row_chunks(self) -> Iterator[Tensor]:
        for part in self._rows.split(self._chunk):
            yield part.to(torch.float64)


def check_normalize(normalize: Normalize) -> None:
    """Raise `ActiveDPOError` for an unknown way to normalise."""
    if normalize not in ("response", "pair", None):
        raise ActiveDPOError(f"normalize must be 'response', 'pair' or None, not {normalize!r}")


def _check_finite(norms: Tensor) -> None:
    bad = (~norms.isfinite()).nonzero().flatten().tolist()
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ActiveDPOError(
            f"rows that are not finite: {', '.join(map(str, bad[:10]))}{more} of {len(norms)}"
        )


def _nonzero(sizes: Tensor) -> Tensor:
    return torch.where(sizes > 0, sizes, 1.0)

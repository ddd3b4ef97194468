"""Features of pairs, computed from response rows: normalized, and never all formed at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import scores as score_ops
from activedpo_fast.selection.signals import check_pairs

if TYPE_CHECKING:
    from activedpo_fast.store.rows import StoredRows

Normalize = Literal["response", "pair"] | None

_CHUNK_BYTES = 2**26  # bytes of float64 features processed at once
# Range of norms whose products with a unit vector neither overflow nor lose digits in float32.
_RANGE = (1e-28, 1e30)


class PairFeatures:
    """The features phi of N pairs (a, b) of R response rows g, formed only when needed.

    `normalize` defines phi:
      * "response": g_a/|g_a| - g_b/|g_b|;
      * "pair": (g_a - g_b)/|g_a - g_b|;
      * None: g_a - g_b;
    times the pair's weight, if weights are given. A zero row or difference stays zero.

    Args:
        rows: [R, k], any floating dtype, in memory or `StoredRows` on disk. They are kept as
            stored, except rows in memory whose norms are out of range for float32 products (below
            1e-28 or above 1e30): those are widened to float64.
        pairs: int64 [N, 2] of row numbers.
        weights: float64 [N], not negative and finite; None for 1.
        show_progress: see `ops.scores.pair_lengths`.

    Attributes:
        rows, pairs: as given (the pairs on the CPU).
        dim: k. device: of the rows.
        row_divisor: float64 [R], and pair_divisor: float64 [N]: divisors of the rows and then of
            their differences. Like all attributes below, they are on the CPU.
        length: float64 [N], |phi|.
        size: float64 [N], the scale of the rounding error of `at`, which is 2.2e-16 * size.
        reach: float64 [N], the scale of the rounding error of phi . w computed from products with
            rows: the sum of the two parts' norms, which may be much larger than |phi|.

    Raises:
        ActiveDPOError: rows that are not finite (listed by number), pairs that do not fit, an
            unknown `normalize`, bad weights. Rows that are in no pair are not checked.
    """

    def __init__(
        self,
        rows: Tensor | StoredRows,
        pairs: Tensor,
        normalize: Normalize,
        weights: Tensor | None = None,
        show_progress: bool | None = False,
    ) -> None:
        check_normalize(normalize)
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ActiveDPOError(
                f"rows must be a floating-point matrix [R, k], not {rows.dtype} {list(rows.shape)}"
            )
        check_pairs(pairs, len(rows), "pairs")
        self.dim = rows.shape[1]
        self.device = rows.device
        self.pairs = pairs.cpu().contiguous()
        by_response = normalize == "response"
        norms, lengths = score_ops.pair_lengths(
            rows, self.pairs, by_row=by_response, show_progress=show_progress
        )
        _check_finite(norms)
        if rows.dtype != torch.float64 and not _in_range(norms):
            if not isinstance(rows, Tensor):
                raise ActiveDPOError(
                    f"rows on disk have norms from {float(norms[norms > 0].min()):.3g} to "
                    f"{float(norms.max()):.3g}: out of range for selection from {rows.dtype} rows"
                )
            rows = rows.to(torch.float64)
        self.rows = rows

        self.row_divisor = _nonzero(norms) if by_response else torch.ones_like(norms)
        self.pair_divisor = _nonzero(lengths) if normalize == "pair" else torch.ones_like(lengths)
        if weights is not None:
            _check_weights(weights, len(pairs))
            # A weight of zero makes a zero feature.
            self.pair_divisor = self.pair_divisor / weights.to("cpu", torch.float64)
        first, second = self.pairs.unbind(1)
        part = norms / self.row_divisor
        self.reach = (part[first] + part[second]) / self.pair_divisor
        self.length = lengths / self.pair_divisor
        # Not normalized by row, the difference is one rounding per entry, however small it is.
        self.size = self.reach if by_response else self.length

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def chunk(self) -> int:
        """The number of features formed at once."""
        return max(1, _CHUNK_BYTES // (8 * max(1, self.dim)))

    def at(self, indices: Tensor) -> Tensor:
        """Return the features of pairs `indices`, int64 [m]: float64 [m, k], on `device`."""
        # Both parts at once: usually one pair is asked for, and calls then cost more than work.
        parts = self.parts(self.pairs[indices].flatten()).view(len(indices), 2, self.dim)
        difference = parts[:, 0] - parts[:, 1]
        return difference.div_(self.pair_divisor[indices, None].to(self.device))

    def parts(self, row_ids: Tensor) -> Tensor:
        """Return rows `row_ids`, int64 [m], divided by their divisors: float64 [m, k]."""
        rows = self.rows
        found = rows[row_ids.to(rows.device)] if isinstance(rows, Tensor) else rows.take(row_ids)
        divisor = self.row_divisor[row_ids, None].to(self.device)
        return found.to(torch.float64, copy=True).div_(divisor)

    def chunks(self) -> Iterator[Tensor]:
        """Yield all features in order, a bounded number at a time: float64 [m, k]."""
        for part in torch.arange(len(self)).split(self.chunk):
            yield self.at(part)


def check_normalize(normalize: Normalize) -> None:
    """Raise `ActiveDPOError` for an unknown `normalize`."""
    if normalize not in ("response", "pair", None):
        raise ActiveDPOError(f"normalize must be 'response', 'pair' or None, not {normalize!r}")


def _check_finite(norms: Tensor) -> None:
    bad = (~norms.isfinite()).nonzero().flatten().tolist()
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ActiveDPOError(
            f"rows that are not finite: {', '.join(map(str, bad[:10]))}{more} of {len(norms)}"
        )


def _check_weights(weights: Tensor, n_pairs: int) -> None:
    if weights.shape != (n_pairs,) or not weights.is_floating_point():
        raise ActiveDPOError(
            f"weights must be floating [{n_pairs}], not {weights.dtype} {list(weights.shape)}"
        )
    bad = (~(weights.isfinite() & (weights >= 0))).nonzero().flatten().tolist()
    if bad:
        raise ActiveDPOError(
            f"weight {bad[0]} is {float(weights[bad[0]])}: weights must be finite and not negative"
        )


def _in_range(norms: Tensor) -> bool:
    used = norms[norms > 0]
    return not len(used) or bool(used.min() >= _RANGE[0] and used.max() <= _RANGE[1])


def _nonzero(sizes: Tensor) -> Tensor:
    return torch.where(sizes > 0, sizes, 1.0)

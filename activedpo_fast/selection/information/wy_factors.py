"""Products of rank-one changes of the identity, and their growing storage."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST = 8  # rows of the first storage


class Rows:
    """A float64 matrix [n, width] that grows by rows. Storage doubles, so a row costs one copy."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._storage = torch.empty(0, width, dtype=torch.float64, device=device)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def values(self) -> Tensor:
        """The rows [n, width], a view."""
        return self._storage[: self._n]

    def append(self, rows: Tensor) -> None:
        """Add rows [m, width] at the end."""
        end = self._n + len(rows)
        if end > len(self._storage):
            storage = self._storage.new_empty(_capacity(end), self._storage.shape[1])
            storage[: self._n] = self.values
            self._storage = storage
        self._storage[self._n : end] = rows
        self._n = end


class Reflections:
    """F = (I - D_t) ... (I - D_1), each D_j symmetric, stored as F = I - D^T T D.

    D [t, k] holds directions and T [t, t] is lower triangular, like products of Householder
    reflections in QR (the compact WY form). Memory: t k + t^2 numbers, up to four times as many
    while the storage doubles. `BatchRoot` is the same product for the picks of one batch, which
    also stores D D^T, to compute F u and F^T F u together.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self._rows = Rows(dim, device)
        self._storage = torch.zeros(0, 0, dtype=torch.float64, device=device)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def directions(self) -> Tensor:
        """D [t, k], a view."""
        return self._rows.values

    @property
    def triangle(self) -> Tensor:
        """T [t, t], a view."""
        return self._storage[: len(self), : len(self)]

    def apply(self, rows: Tensor) -> Tensor:
        """Return F x for every row x: [N, k] -> [N, k]."""
        if len(self) == 0:
            return rows
        return rows - (rows @ self.directions.T) @ self.triangle.T @ self.directions

    def apply_transposed(self, rows: Tensor) -> Tensor:
        """Return F^T x for every row x: [N, k] -> [N, k]."""
        if len(self) == 0:
            return rows
        return rows - (rows @ self.directions.T) @ self.triangle @ self.directions

    def push(self, u: Tensor, weight: float) -> Tensor:
        """F <- (I - weight u u^T) F.

        Args:
            u: [k].

        Returns:
            F^T u [k] for the old F. D u is used for it and for the new row of T, so D is read only
            twice in total.
        """
        mixed = (self.directions @ u) @ self.triangle  # T^T D u
        pulled = u - mixed @ self.directions
        self._append(u[None], -weight * mixed[None], u.new_tensor([weight]))
        return pulled

    def push_many(self, directions: Tensor, weights: Tensor) -> None:
        """F <- (I - sum of weights_j d_j d_j^T) F for orthogonal rows d_j [m, k]."""
        mixed = (directions @ self.directions.T) @ self.triangle
        self._append(directions, -weights[:, None] * mixed, weights)

    def dense(self) -> Tensor:
        """Return F as a matrix [k, k]."""
        d = self.directions
        identity = torch.eye(d.shape[1], dtype=d.dtype, device=d.device)
        return identity.addmm_(d.T, self.triangle @ d, alpha=-1)

    def times_(self, matrix: Tensor) -> None:
        """matrix <- F matrix, in place: [k, k]."""
        matrix.addmm_(self.directions.T, self.triangle @ (self.directions @ matrix), alpha=-1)

    def _append(self, directions: Tensor, below: Tensor, diagonal: Tensor) -> None:
        t = len(self)
        self._rows.append(directions)
        self._grow()
        self.triangle[t:, :t] = below
        self.triangle.diagonal()[t:] = diagonal

    def _grow(self) -> None:
        """Make room for a T as long as D; entries above its diagonal stay zero."""
        old = self._storage
        if len(self) > len(old):
            self._storage = old.new_zeros(_capacity(len(self)), _capacity(len(self)))
            self._storage[: len(old), : len(old)] = old


def _capacity(n: int) -> int:
    """Return the storage size for n rows, a power of two."""
    return max(_FIRST, 1 << (n - 1).bit_length())

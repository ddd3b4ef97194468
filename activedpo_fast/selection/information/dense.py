"""The matrices X and V of an information matrix in explicit form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from activedpo_fast.ops import rank_update_
from activedpo_fast.selection.information.wy_factors import Reflections

_EPS = torch.finfo(torch.float64).eps
_PROBES = 4


class DenseBase:
    """V = ridge I + a sum of points, and a root X of its inverse, both float64 [k, k].

    Attributes:
        root: X.
        v: V, on and below its diagonal; entries above it are never read.
        ridge: lam/kappa.
    """

    def __init__(self, root: Tensor, v: Tensor, ridge: float) -> None:
        self.root = root
        self.v = v
        self.ridge = ridge

    @classmethod
    def of(cls, changes: Reflections, points: Tensor, ridge: float) -> DenseBase:
        """Return X = changes / sqrt(ridge) and V = ridge I + sum over the points [p, k]."""
        v = torch.eye(points.shape[1], dtype=points.dtype, device=points.device).mul_(ridge)
        rank_update_(v, points)
        return cls(changes.dense().div_(math.sqrt(ridge)), v, ridge)

    def fold(self, changes: Reflections, points: Tensor) -> None:
        """X <- changes X and V <- V + sum over the points [p, k], in place."""
        changes.times_(self.root)
        rank_update_(self.v, points)

    def rounding(self) -> float:
        """Return the rough rounding error of V: 2.2e-16 |V|_F."""
        return _EPS * _norm(self.v)

    def drift_bound(self) -> float:
        """Return a generous bound on the drift that V's rounding, amplified by X, can explain."""
        enlarged = min(float(torch.linalg.matrix_norm(self.root)) ** 2, 1 / self.ridge)  # |X|_2^2
        return max(1e-12, 32 * self.rounding() * enlarged / math.sqrt(len(self.v)))

    def drift(self) -> float:
        """Return |X V X^T z - z| / |z| over seeded normal vectors z."""
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(_PROBES, len(self.v), generator=generator, dtype=self.v.dtype)
        z = z.to(self.v.device)
        y = z @ self.root
        below = self.v.tril(-1)
        product = y @ below + y @ below.T + y * self.v.diagonal()
        error = product @ self.root.T - z
        return float(torch.linalg.vector_norm(error) / torch.linalg.vector_norm(z))

    def rebuilt(self) -> DenseBase | None:
        """Return the same V with X = L^-1 from V = L L^T; None if V is not positive definite."""
        factor, failed = torch.linalg.cholesky_ex(self.v)  # reads the lower triangle
        if int(failed):
            return None
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        root = torch.linalg.solve_triangular(factor, identity, upper=False)
        return DenseBase(root, self.v, self.ridge)

    def log_gain(self) -> float:
        """Return log det V - log det ridge I, for triangular X (`rebuilt`)."""
        return -2 * float((self.root.diagonal() * math.sqrt(self.ridge)).log().sum())


def _norm(v: Tensor) -> float:
    """Return the Frobenius norm of a symmetric matrix, from entries on and below its diagonal."""
    below = float(torch.linalg.matrix_norm(v.tril(-1)))
    return math.hypot(math.sqrt(2) * below, float(torch.linalg.vector_norm(v.diagonal())))

"""The information matrix of the pairs chosen so far, and its quadratic form."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError

Form = Literal["auto", "low_rank", "explicit"]

_EPS = torch.finfo(torch.float64).eps
_BLOCK = 512  # rows of one singular value decomposition in add_many


class InformationMatrix:
    """V = (lam/kappa) I + sum of phi phi^T, with scores phi^T V^-1 phi (arXiv 2505.19241).

    What is kept is a square root X of the inverse, V^-1 = X^T X, and never V^-1 itself. At first
    X = sqrt(kappa/lam) I. A new point phi with u = X phi, score s = |u|^2 and unit vector d = u/|u|
    makes it

        X <- (I - eta d d^T) X,    eta = 1 - 1/sqrt(1 + s),

    which is the Sherman-Morrison update of X^T X (Potter's square-root filter). The score is a sum
    of squares, so it cannot be negative, and the digits lost when a direction has been seen before
    are half of those that the difference (kappa/lam)|phi|^2 - |W phi|^2 loses: the root of a score
    cancels from sqrt(kappa/lam)|phi|, not the score from (kappa/lam)|phi|^2.

    Two forms of the same X, chosen by `form`:
      * `"low_rank"`: the directions D [t, k] and a lower triangular T [t, t] with
        X = sqrt(kappa/lam) (I - D^T T D), as products of reflections are kept in QR.
        O(t k) a point.
      * `"explicit"`: X itself, [k, k]. O(k^2) a point.
      * `"auto"`: low rank until more than k/2 directions are kept, explicit from then on.

    Accuracy: the absolute error of sqrt(score) is a small multiple (`error_scale`) of
    2.2e-16 * sqrt(kappa/lam) * |phi|. For unit-norm features and lam/kappa from 1e-6 to 1e3 scores
    are within 1e-11 (relative) of exact arithmetic, exact duplicates included. On top of that,
    a point that was all but known already (sqrt(score) far below sqrt(kappa/lam) |phi|) is absorbed
    in a direction that is off by the angle error / sqrt(score), which turns what is left of others.

    Args:
        dim: k, the length of a feature.
        lam, kappa: lambda and kappa of the method, positive.
        form: see above.
        device: where the state is; features are moved there.

    All state and all results are float64, whatever the features' dtype.

    Raises:
        ActiveDPOError: lam, kappa or dim not positive and finite, an unknown form, features of
            another width.
    """

    def __init__(
        self,
        dim: int,
        *,
        lam: float = 1.0,
        kappa: float = 1.0,
        form: Form = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        if dim < 1:
            raise ActiveDPOError(f"dim must be 1 or more, not {dim}")
        check_positive("lam", lam)
        check_positive("kappa", kappa)
        if form not in ("auto", "low_rank", "explicit"):
            raise ActiveDPOError(f"form must be 'auto', 'low_rank' or 'explicit', not {form!r}")
        self.dim = dim
        self.lam = lam
        self.kappa = kappa
        self.form = form
        self.device = torch.device(device)
        self.count = 0  # t, the points added
        self._log_gain = 0.0  # log det V - log det V_0
        self._directions = self._zeros(0, dim)
        self._triangle = self._zeros(0, 0)
        self._root: Tensor | None = None  # X, once the form is explicit
        if form == "explicit":
            self._to_explicit()

    @property
    def is_explicit(self) -> bool:
        """Whether X is kept as a [k, k] matrix now."""
        return self._root is not None

    def score(self, phi: Tensor) -> Tensor:
        """phi^T V^-1 phi of every row: [N, k] -> float64 [N], never negative."""
        return self._apply(self._checked(phi, 2)).square().sum(dim=1)

    def solve(self, phi: Tensor) -> Tensor:
        """V^-1 phi: [k] -> float64 [k], or row by row [N, k] -> [N, k]."""
        rows = self._checked(phi, phi.ndim if phi.ndim in (1, 2) else 2)
        return self._apply_transposed(self._apply(rows.reshape(-1, self.dim))).reshape(rows.shape)

    def logdet(self) -> float:
        """log det V."""
        return self.dim * math.log(self.lam / self.kappa) + self._log_gain

    def add(self, phi: Tensor) -> Tensor:
        """V <- V + phi phi^T.

        Args:
            phi: [k].

        Returns:
            w = V_before^-1 phi / sqrt(1 + phi^T V_before^-1 phi), float64 [k]. The score of any x
            falls by (x . w)^2.
        """
        u = self._apply(self._checked(phi, 1)[None])  # [1, k]
        length = float(torch.linalg.vector_norm(u))
        w = self._apply_transposed(u)[0] / math.sqrt(1 + length**2)
        if length > 0:
            self._absorb(u / length, u.new_tensor([length]))
        self.count += 1
        return w

    def add_many(self, phi: Tensor) -> None:
        """V <- V + sum of phi phi^T over the rows of phi [m, k] (Woodbury, in blocks)."""
        for block in self._checked(phi, 2).split(_BLOCK):
            # With U = block X^T = P S D: I + U^T U has the eigenvectors D and values 1 + S^2.
            # Not the smaller U U^T: forming it would square the condition number.
            _, lengths, directions = torch.linalg.svd(self._apply(block), full_matrices=False)
            seen = lengths > 0
            self._absorb(directions[seen], lengths[seen])
            self.count += len(block)

    def error_scale(self) -> float:
        """Bound on the error of sqrt(score) of a unit feature formed without error.

        A generous estimate, not a proof: rounding errors of length-k sums grow like sqrt(k).
        """
        return (16 + 4 * math.sqrt(self.dim)) * _EPS * math.sqrt(self.kappa / self.lam)

    def _absorb(self, directions: Tensor, lengths: Tensor) -> None:
        """X <- (I - sum of eta_j d_j d_j^T) X for orthonormal rows d_j [m, k], s_j = lengths^2."""
        root = torch.sqrt(1 + lengths.square())
        eta = lengths.square() / (root * (1 + root))  # 1 - 1/root, without cancellation
        self._log_gain += float(torch.log1p(lengths.square()).sum())
        if self._root is not None:
            self._root -= (eta[:, None] * directions).T @ (directions @ self._root)
            return
        t, m = len(self._directions), len(directions)
        triangle = self._zeros(t + m, t + m)
        triangle[:t, :t] = self._triangle
        triangle[t:, :t] = -eta[:, None] * (directions @ self._directions.T @ self._triangle)
        triangle[t:, t:] = torch.diag(eta)
        self._triangle = triangle
        self._directions = torch.cat([self._directions, directions])
        if self.form == "auto" and t + m > self.dim / 2:
            self._to_explicit()

    def _to_explicit(self) -> None:
        identity = torch.eye(self.dim, dtype=torch.float64, device=self.device)
        self._root = self._apply(identity).T.contiguous()
        self._directions = self._zeros(0, self.dim)
        self._triangle = self._zeros(0, 0)

    def _apply(self, rows: Tensor) -> Tensor:
        """X phi for every row phi: [N, k] -> [N, k]."""
        if self._root is not None:
            return rows @ self._root.T
        seen = (rows @ self._directions.T) @ self._triangle.T @ self._directions
        return math.sqrt(self.kappa / self.lam) * (rows - seen)

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        """X^T u for every row u: [N, k] -> [N, k]."""
        if self._root is not None:
            return rows @ self._root
        seen = (rows @ self._directions.T) @ self._triangle @ self._directions
        return math.sqrt(self.kappa / self.lam) * (rows - seen)

    def _checked(self, phi: Tensor, ndim: int) -> Tensor:
        if phi.ndim != ndim or phi.shape[-1] != self.dim:
            wanted = f"[{self.dim}]" if ndim == 1 else f"[N, {self.dim}]"
            raise ActiveDPOError(f"features must be {wanted}, not {list(phi.shape)}")
        return phi.to(self.device, torch.float64)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)


def check_positive(name: str, value: float) -> None:
    """Raise `ActiveDPOError` unless `value` is a positive, finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise ActiveDPOError(f"{name} must be a positive, finite number, not {value!r}")

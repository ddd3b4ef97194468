"""The information matrix of the pairs chosen so far, and scores from it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.information.dense import DenseBase
from activedpo_fast.selection.information.wy_factors import Reflections, Rows

Form = Literal["auto", "low_rank", "explicit"]

_FORMS = ("auto", "low_rank", "explicit")
_EPS = torch.finfo(torch.float64).eps
_BLOCK = 256  # rows of one factorization in add_many
_PENDING = 64  # points that the explicit form collects before it updates its matrices
_WATCH = 1024  # points between two measurements of the drift

_SMALLEST = 1e-100  # of lam / kappa: its square and that of its inverse are float64 numbers


class InformationMatrix:
    """V = (lam/kappa) I + sum of phi phi^T, with scores phi^T V^-1 phi (arXiv 2505.19241).

    The class stores a square root X of the inverse, V^-1 = X^T X, never V^-1 itself. Initially
    X = sqrt(kappa/lam) I. A new point phi with u = X phi and score s = |u|^2 updates it:

        X <- (I - weight u u^T) X,    weight = (1 - 1/sqrt(1 + s)) / s,

    This is the Sherman-Morrison update of X^T X (Potter's square-root filter). The score is a sum
    of squares, so it cannot be negative. In directions seen before, it loses half as many digits as
    the difference (kappa/lam)|phi|^2 - |W phi|^2 does: the cancellation is in the root of the
    score, from sqrt(kappa/lam)|phi|, not in the score, from (kappa/lam)|phi|^2.

    X = F B, where F = I - D^T T D is the product of the latest changes (`Reflections`), and V is a
    base A plus the sum over the latest points P [p, k]. The forms differ in the base:

      * `"low_rank"`: B = sqrt(kappa/lam) I, A = (lam/kappa) I; D and P hold everything since the
        start. O(t k) per point for t directions: D is read twice. Memory: 2 t k + t^2 numbers,
        twice that after the storage doubles.
      * `"explicit"`: B and A are [k, k] matrices into which the latest points are folded, 64 at a
        time. O(k^2) per point: B is read once. Memory: 2 k^2 numbers (1 GiB at k = 8192), and
        briefly up to 6 k^2 when X is rebuilt from V.
      * `"auto"`: low rank until more than k/2 directions are kept, explicit from then on.

    Accuracy: the absolute error of sqrt(score) is a small multiple (`error_scale`) of
    2.2e-16 * sqrt(kappa/lam) * |phi|. For unit-norm features and lam/kappa from 1e-6 to 1e3 scores
    are within 1e-11 (relative) of exact arithmetic, including exact duplicates. In addition, a
    point that was almost known (sqrt(score) far below sqrt(kappa/lam) |phi|) is absorbed in a
    direction that is off by the angle error / sqrt(score), which rotates the residuals of other
    points.

    Drift: in the explicit form, `drift` is measured every 1024 points: |X V X^T z - z| / |z| over
    seeded probe vectors z. V has its own rounding error, which X amplifies by |X|^2, up to
    kappa/lam, while the chain of updates loses about the root of that. So X is rebuilt from V by
    Cholesky factorization only if the drift is above both 1e-12 and
    32 * 2.2e-16 * |V|_F * min(|X|_F^2, kappa/lam) / sqrt(k), which V's rounding cannot explain.
    The new X is kept only if its measured drift is lower.

    Args:
        dim: k, the length of a feature.
        lam, kappa: lambda and kappa of the method, positive.
        form: see above.
        device: the device of the state; features are moved there.

    Attributes:
        drift: the last measured drift; None in the low-rank form and before the first measurement.
        count: the number of points added.

    All state and all results are float64, whatever the features' dtype.

    Raises:
        ActiveDPOError: lam, kappa or dim not positive and finite, lam/kappa beyond 1e±100, an
            unknown form, features of another width or not finite. The matrix is then unchanged.

    Examples:
        >>> import torch
        >>> from activedpo_fast import InformationMatrix
        >>> information = InformationMatrix(dim=3)
        >>> features = torch.eye(3)
        >>> information.add_many(features[:2])
        >>> information.score(features)
        tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
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
        check_ridge(lam, kappa)
        if form not in _FORMS:
            raise ActiveDPOError(f"form must be 'auto', 'low_rank' or 'explicit', not {form!r}")
        self.dim = dim
        self.lam = lam
        self.kappa = kappa
        self.form = form
        self.device = torch.device(device)
        self.count = 0  # t, the points added
        self._log_gain = 0.0  # log det V - log det V_0
        self.drift: float | None = None  # as last measured
        self._unwatched = 0  # points since the drift was measured
        self._base: DenseBase | None = None  # B and A, once the form is explicit
        self._latest = Reflections(self.dim, self.device)
        self._points = Rows(self.dim, self.device)
        if self.form == "explicit":
            self._fold()

    def score(self, phi: Tensor) -> Tensor:
        """Return phi^T V^-1 phi of every row: [N, k] -> float64 [N], never negative."""
        return self.whiten(phi).square().sum(dim=1)

    def solve(self, phi: Tensor) -> Tensor:
        """Return V^-1 phi: [k] -> float64 [k], or row by row [N, k] -> [N, k]."""
        rows = self._checked(phi, phi.ndim if phi.ndim in (1, 2) else 2)
        return self.pull_back(self.whiten(rows.reshape(-1, self.dim))).reshape(rows.shape)

    def logdet(self) -> float:
        """Return log det V."""
        return self.dim * math.log(self._ridge) + self._log_gain

    def error_scale(self) -> float:
        """Return a bound on the error of sqrt(score) for a unit feature formed without error.

        A generous estimate, not a proof: rounding errors of length-k sums grow like sqrt(k).
        """
        return (16 + 4 * math.sqrt(self.dim)) * _EPS * self._scale

    def whiten(self, phi: Tensor) -> Tensor:
        """Return u = X phi of every row: [m, k] -> float64 [m, k]; |u|^2 is the score.

        X is one of many roots of V^-1, and any change of the matrix may replace it by another: u is
        valid until then.
        """
        rows = self._checked(phi, 2)
        return self._latest.apply(
            self._scale * rows if self._base is None else rows @ self._base.root.T
        )

    def pull_back(self, u: Tensor) -> Tensor:
        """Return X^T u of every row: [m, k] -> float64 [m, k]; V^-1 phi for u = whiten(phi)."""
        rows = self._latest.apply_transposed(self._checked(u, 2))
        return self._scale * rows if self._base is None else rows @ self._base.root

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return X = (I - D^T Y) B as (B, D, Y).

        B is [k, k], or None for sqrt(kappa/lam) I; D and Y are [t, k]. This is the WY form of a
        product of reflections (Bischof and Van Loan, 1987). D and B are views.
        """
        latest = self._latest
        return (
            None if self._base is None else self._base.root,
            latest.directions,
            latest.triangle @ latest.directions,
        )

    def add(self, phi: Tensor) -> Tensor:
        """V <- V + phi phi^T.

        Args:
            phi: [k].

        Returns:
            w = V_before^-1 phi / sqrt(1 + phi^T V_before^-1 phi), float64 [k]. The score of any x
            falls by (x . w)^2.
        """
        phi = self._checked(phi, 1)
        u = self.whiten(phi[None])[0]
        score = float(u @ u)
        if not math.isfinite(score):
            raise ActiveDPOError("a feature is not finite, or so large that its score overflows")
        root = math.sqrt(1 + score)
        pulled = self._latest.push(u, 1 / (root * (1 + root)))  # (1 - 1/root) / score
        solved = self._scale * pulled if self._base is None else pulled @ self._base.root
        self._added(phi[None], math.log1p(score))
        return solved / root

    def add_many(self, phi: Tensor) -> None:
        """V <- V + sum of phi phi^T over the rows of phi [m, k] (Woodbury, in blocks)."""
        phi = self._checked(phi, 2)
        if not bool(torch.isfinite(phi).all()):
            raise ActiveDPOError("a feature is not finite")
        for block in phi.split(_BLOCK):
            # With U = block X^T and U^T = Q R = Q W S P: I + U^T U has the eigenvectors Q W and
            # values 1 + S^2. Do not use the smaller U U^T: it squares the condition number.
            q, r = torch.linalg.qr(self.whiten(block).T)
            w, lengths, _ = torch.linalg.svd(r, full_matrices=False)
            scores = lengths.square()
            root = torch.sqrt(1 + scores)
            weights = scores / (root * (1 + root))  # 1 - 1/root, without cancellation
            seen = weights > 1e-3 * _EPS  # smaller weights change nothing
            self._latest.push_many((q @ w[:, seen]).T, weights[seen])
            self._added(block, float(scores.log1p().sum()))

    @property
    def _ridge(self) -> float:
        return self.lam / self.kappa

    @property
    def _scale(self) -> float:
        return math.sqrt(self.kappa / self.lam)

    def _added(self, points: Tensor, log_gain: float) -> None:
        """Record points [m, k] that X has already absorbed."""
        self._points.append(points)
        self.count += len(points)
        self._log_gain += log_gain
        self._unwatched += len(points)
        if self._base is None:
            if self.form == "auto" and len(self._latest) > self.dim / 2:
                self._fold()
        elif len(self._points) >= _PENDING:
            self._fold()
            if self._unwatched >= _WATCH:
                self._watch(self._base)

    def _fold(self) -> None:
        """Fold the latest changes and points into B and A; the form is explicit from then on."""
        points = self._points.values
        if self._base is None:
            self._base = DenseBase.of(self._latest, points, self._ridge)
        else:
            self._base.fold(self._latest, points)
        self._latest = Reflections(self.dim, self.device)
        self._points = Rows(self.dim, self.device)

    def _watch(self, base: DenseBase) -> None:
        """Measure the drift after `_fold`, and rebuild X if that helps."""
        self._unwatched = 0
        self.drift = base.drift()
        if self.drift > base.drift_bound():
            rebuilt = base.rebuilt()
            if rebuilt is not None and (better := rebuilt.drift()) < self.drift:
                self._base, self.drift, self._log_gain = rebuilt, better, rebuilt.log_gain()

    def _checked(self, phi: Tensor, ndim: int) -> Tensor:
        if phi.ndim != ndim or phi.shape[-1] != self.dim:
            wanted = f"[{self.dim}]" if ndim == 1 else f"[N, {self.dim}]"
            raise ActiveDPOError(f"features must be {wanted}, not {list(phi.shape)}")
        return phi.detach().to(self.device, torch.float64)


def check_positive(name: str, value: float) -> None:
    """Raise `ActiveDPOError` unless `value` is a positive, finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise ActiveDPOError(f"{name} must be a positive, finite number, not {value!r}")


def check_ridge(lam: float, kappa: float) -> None:
    """Raise `ActiveDPOError` unless lam and kappa are positive and give scores that are numbers."""
    check_positive("lam", lam)
    check_positive("kappa", kappa)
    if not _SMALLEST <= lam / kappa <= 1 / _SMALLEST:
        raise ActiveDPOError(
            f"lam / kappa is {lam:g} / {kappa:g}, beyond {_SMALLEST:g} to {1 / _SMALLEST:g}: "
            "scores would overflow or vanish"
        )

"""The change of V's root by the picks of a batch, stored so that a pick reads it only twice."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_MUCH = 0.1  # fraction of |u|^2 above which F u has all of u's digits except one


class Look(NamedTuple):
    """F applied to m vectors u, where V = X_0^-1 (F^T F)^-1 X_0^-T and u = X_0 phi.

    residual: F u, [m, k], whose squared length is the score. pulled: F^T F u, [m, k].
    onto: D F u, and mixed: T^T D F u, [m, t]; see `BatchRoot`.
    """

    residual: Tensor
    pulled: Tensor
    onto: Tensor
    mixed: Tensor

    def row(self, at: int) -> Look:
        """Return one of the m vectors' values, without the first dimension."""
        return Look(*(x[at] for x in self))


class BatchRoot:
    """F = (I - e_t r_t r_t^T) ... (I - e_1 r_1 r_1^T), one factor per pick, as F = I - D^T T D.

    D [t, k] has the residuals r of the picks and T [t, t] is lower triangular (the compact WY form
    of products of reflections). D D^T is stored too: with it, F u and F^T F u take two reads of D
    instead of four. Reading D is most of the cost of a pick besides scanning candidates.

    The class `Reflections` has the same product without D D^T. The information matrix, which needs
    F u or F^T u but seldom both, adds many points at a time and has no limit to their number, uses
    that: D D^T would cost it t numbers per direction and buy nothing. A batch has a maximum size,
    so everything here is allocated once.

    Args:
        capacity: the maximum number of picks. dim: k. Memory: capacity (k + 2 capacity) float64
        numbers.
    """

    def __init__(self, capacity: int, dim: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._directions = zeros(capacity, dim)
        self._triangle = zeros(capacity, capacity)
        self._gram = zeros(capacity, capacity)
        self._t = 0

    def __len__(self) -> int:
        return self._t

    @property
    def full(self) -> bool:
        return self._t == len(self._directions)

    def look(self, u: Tensor) -> Look:
        """Return F u and the other values a pick needs, for every row u: [m, k]."""
        t, m = self._t, len(u)
        if t == 0:
            nothing = u.new_empty(m, 0)
            return Look(u, u, nothing, nothing)
        directions, triangle = self._directions[:t], self._triangle[:t, :t]
        gram = self._gram[:t, :t]
        along = u @ directions.T
        change = along @ triangle.T
        onto = along - change @ gram
        length = u.square().sum(dim=1) - (change * (along + onto)).sum(dim=1)  # |F u|^2
        if bool((length >= _MUCH * u.square().sum(dim=1)).all()):
            mixed = onto @ triangle
            changes = torch.cat([change, mixed]) @ directions
            residual = u - changes[:m]
            return Look(residual, residual - changes[m:], onto, mixed)
        # If little is left of u, D F u must be computed from F u as rounded.
        residual = u - change @ directions
        onto = residual @ directions.T
        mixed = onto @ triangle
        return Look(residual, residual - mixed @ directions, onto, mixed)

    def append(self, look: Look) -> float:
        """F <- (I - e r r^T) F for r = F u of one vector, so that V grows by phi phi^T.

        Returns:
            The score |r|^2 before the update.
        """
        t = self._t
        score = float(look.residual @ look.residual)
        root = math.sqrt(1 + score)
        weight = 1 / (root * (1 + root))  # (1 - 1/root) / score
        self._directions[t] = look.residual
        self._triangle[t, :t] = look.mixed
        self._triangle[t, :t] *= -weight
        self._triangle[t, t] = weight
        self._gram[t, :t] = look.onto
        self._gram[:t, t] = look.onto
        self._gram[t, t] = score
        self._t += 1
        return score

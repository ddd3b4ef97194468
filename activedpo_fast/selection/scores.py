"""Scores of all candidates while the batch grows: exact where it matters, lazy elsewhere."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from activedpo_fast import score_ops
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.information import InformationMatrix
from activedpo_fast.selection.normalize import PairFeatures
from activedpo_fast.selection.rules import Eligible


class Contenders(NamedTuple):
    """Candidates that may be the best, with fresh scores.

    indices: int64 [m], ascending. score, doubt: float64 [m]; the score is right to within doubt.
    """

    indices: Tensor
    score: Tensor
    doubt: Tensor


class _Whitened(NamedTuple):
    """Candidates that were scored last: u = X_0 phi and X phi of each, with V as it is."""

    indices: Tensor
    u: Tensor
    residual: Tensor


class RunningScores:
    """phi^T V^-1 phi of every candidate while V takes in one pick after another.

    With X_0 the root of V_0^-1 that `information` keeps, candidates are u = X_0 phi and a batch of
    picks makes another information matrix, of the u's: V = X_0^-1 (I + sum of u u^T) X_0^-T. A pick
    lowers every score by (phi . w)^2 with one w, so old scores are upper bounds, and most of them
    never have to be looked at again (Minoux, "Accelerated greedy algorithms", 1978):
    `score_ops.advance` brings only those up to date that may be the largest, for many directions w
    at once.

    These running scores are sums of rounded products (in float32 for rows of up to 32 bits), so
    each carries a bound of its error, and the few that the bounds leave in the race are computed
    afresh in float64 from V's root.

    A fresh score has errors too: those of its own rounding, and one that it inherits. Rounding
    turns the direction that a pick p is absorbed in by an angle of at most e |phi_p| / sqrt(gain),
    where e bounds the root's rounding. A score s that falls by f^2 to s' is thereby off by at most
    2 |f| t + t^2 with t = e |phi_p| sqrt(s') / sqrt(1 + gain). Up to a rotation that all candidates
    share, what is left of u is off by a vector no longer than e |phi_p| |f| / sqrt(1 + gain), and
    later picks only shorten that: the sum of these lengths is what a fresh root of a score
    inherits. So near-ties are only called ties where float64 cannot tell.

    Args:
        features: the candidates. information: V_0; it is not changed.
        eligible: which candidates are left, and what scores are multiplied with to be compared.
        n: the most picks there will be.
    """

    def __init__(
        self, features: PairFeatures, information: InformationMatrix, eligible: Eligible, n: int
    ) -> None:
        self._features = features
        self._information = information
        self._eligible = eligible
        # u = X_0 phi is as wide as phi; its own prior is the identity.
        self._batch = InformationMatrix(features.dim, device=features.device)
        scale = math.sqrt(information.kappa / information.lam)
        # The root's rounding, over |phi|. A multiple of the identity adds nothing to the batch's.
        stages = 2 if information.count else 1
        self._error = stages * information.error_scale()
        self._w_error = self._error * scale
        self.state = score_ops.ScoreState.start(
            features.rows, features.pairs, features.row_divisor, features.pair_divisor,
            features.reach, eligible.left, eligible.inverse_cost, *self._first_scores(), n)
        self._rounds = information.count > 0  # whether running scores round more than fresh ones
        nothing = torch.empty(0, features.dim, dtype=torch.float64, device=features.device)
        self._last = _Whitened(torch.empty(0, dtype=torch.int64), nothing, nothing)

    @property
    def touched(self) -> int:
        """How many rows have been looked at since the first scores, repeatedly or not."""
        return self.state.touched

    def best(self) -> Contenders:
        """The candidates left that may have the largest value, scored afresh; there must be one."""
        found = score_ops.advance(self.state)
        state = self.state
        # Scores by the identity alone are fresh, and those of zero features always are.
        if self._rounds and bool((state.score[found] + state.doubt[found] > 0).any()):
            self.refresh(found)
        value = self._value(found, state.score[found] - state.doubt[found])
        within = self._value(found, state.score[found] + state.doubt[found]) >= value.max()
        found = found[within]
        return Contenders(found, state.score[found], state.doubt[found])

    def score(self, index: int) -> float:
        """One candidate's score, afresh."""
        self.refresh(torch.tensor([index]))
        return float(self.state.score[index])

    def refresh(self, indices: Tensor) -> None:
        """Compute the scores of `indices` anew, from the root of V."""
        state = self.state
        for part in indices.split(self._features.chunk):
            self._last = _Whitened(part, *self._whiten(self._features.at(part)))
            score = self._last.residual.square().sum(dim=1).cpu()
            error = self._error * self._features.size[part] + state.inherited[part]
            state.score[part] = score
            state.doubt[part] = 2 * score.sqrt() * error + error.square()
            state.version[part] = state.count

    def take(self, index: int) -> float:
        """V <- V + phi phi^T for a candidate; returns phi^T V^-1 phi with V as it was."""
        place = (self._last.indices == index).nonzero().flatten()
        if not len(place):
            self.refresh(torch.tensor([index]))
            place = torch.zeros(1, dtype=torch.int64)
        at = int(place[0])
        return self._learn(self._last.u[at], self._last.residual[at],
                           float(self._features.size[index]))

    def feature(self, index: int) -> Tensor:
        """phi of one candidate and what its rounding is relative to, float64 [k + 1]."""
        phi = self._features.at(torch.tensor([index]))[0]
        return torch.cat([phi, self._features.size[index, None].to(phi.device)])

    def learn(self, feature: Tensor) -> float:
        """As `take`, for a candidate that another process may have: its `feature`."""
        phi = feature[:-1].to(self._features.device)
        u, residual = self._whiten(phi[None])
        return self._learn(u[0], residual[0], float(feature[-1]))

    def _learn(self, u: Tensor, residual: Tensor, size: float) -> float:
        gain = float(residual @ residual)
        w = self._information.pull_back(self._batch.absorb(residual, u)[None])[0]
        share = size / math.sqrt(1 + gain)
        self.state.append(w, error=self._w_error * share, turn=self._error * share)
        self._rounds = True
        self._last = self._last._replace(indices=self._last.indices[:0])
        return gain

    def _whiten(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """u = X_0 phi, and X phi with the batch's picks taken in: [m, k] each."""
        u = self._information.whiten(phi)
        return u, self._batch.whiten(u)

    def _value(self, indices: Tensor, scores: Tensor) -> Tensor:
        inverse_cost = self._eligible.inverse_cost
        return scores if inverse_cost is None else scores * inverse_cost[indices]

    def _first_scores(self) -> tuple[Tensor, Tensor]:
        features, information = self._features, self._information
        if information.count == 0:
            score = information.kappa / information.lam * features.length.square()
            error = self._error * features.size
        else:
            everything = torch.arange(len(features))
            parts = [self._first_part(part) for part in everything.split(features.chunk)]
            score = torch.cat([features.length[:0], *parts])
            error = self._error * features.reach
        if not bool(score.isfinite().all()):
            raise ActiveDPOError("a feature is too large for its score")
        return score, 2 * score.sqrt() * error + error.square()

    def _first_part(self, part: Tensor) -> Tensor:
        """Scores of a stretch of pairs; where rows are shared by several pairs, row by row."""
        features = self._features
        rows, place = features.pairs[part].unique(return_inverse=True)
        if len(rows) >= len(part):
            return self._information.whiten(features.at(part)).square().sum(dim=1).cpu()
        whitened = self._information.whiten(features.parts(rows))
        difference = whitened[place[:, 0]] - whitened[place[:, 1]]
        return difference.square().sum(dim=1).cpu() / features.pair_divisor[part].square()

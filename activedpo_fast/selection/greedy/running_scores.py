"""Scores of all candidates while the batch grows: exact for contenders, lazy for the others."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import scores as score_ops
from activedpo_fast.progress import progress_bar
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.batch_root import BatchRoot, Look
from activedpo_fast.selection.greedy.contest import Contenders
from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.pair_features import PairFeatures

_BATCH = 2048  # picks that are kept outside the information matrix
_STAGES = 2  # both u = X_0 phi and F u round


class RunningScores:
    """phi^T V^-1 phi of every candidate as picks are added to V one after another.

    With X_0 the root of V_0^-1 stored in `information`, candidates are u = X_0 phi, and a batch of
    picks forms an information matrix of the u's: V = X_0^-1 (I + sum of u u^T) X_0^-T. A pick
    lowers every score by (phi . w)^2 with the same w, so old scores are upper bounds, and most of
    them never need to be updated (Minoux, "Accelerated greedy algorithms", 1978):
    `ops.scores.advance` updates only those that may be the largest, for many directions w at once.

    These running scores are sums of rounded products (in float32 for rows of up to 32 bits), so
    each carries a bound on its error. The few that the bounds cannot rule out are recomputed in
    float64 from V's root.

    A fresh score has errors too: its own rounding, and an inherited error. Rounding rotates the
    direction that absorbs a pick p: the angle is at most e |phi_p| / sqrt(gain), where e bounds the
    root's rounding. A score s that falls by f^2 to s' is therefore off by at most
    2 |f| t + t^2 with t = e |phi_p| sqrt(s') / sqrt(1 + gain). Up to a rotation that all candidates
    share, the residual of u is off by a vector no longer than e |phi_p| |f| / sqrt(1 + gain), and
    later picks only shorten that vector. The sum of these lengths is the inherited error of a fresh
    score's root. So near-ties count as ties only if float64 cannot tell them apart.

    Args:
        features: the candidates. information: V_0; it is not changed.
        eligible: which candidates remain, and the factors for comparing scores.
        n: the maximum number of picks.
        show_progress: a bar over the first scores, if V_0 has points.
    """

    def __init__(
        self,
        features: PairFeatures,
        information: InformationMatrix,
        eligible: Eligible,
        n: int,
        show_progress: bool | None = False,
    ) -> None:
        self._features = features
        self._information = information
        self._n = n
        self._batch = BatchRoot(min(n, _BATCH), features.dim, features.device)
        self._picks: list[Tensor] = []  # features in the batch, if it may become full
        scale = math.sqrt(information.kappa / information.lam)
        self._error = root_error(information)
        self._w_error = self._error * scale
        self.state = score_ops.ScoreState.start(
            features.rows,
            features.pairs,
            features.row_divisor,
            features.pair_divisor,
            features.reach,
            eligible.remaining,
            eligible.inverse_cost,
            *first_scores(features, information, show_progress),
            n,
        )
        self._rounds = information.count > 0  # whether running scores round more than fresh ones
        self._last: tuple[Tensor, Tensor, Look] | None = None  # indices, features, and their look

    @property
    def touched(self) -> int:
        """Number of rows read since the first scores, counting repeats."""
        return self.state.touched

    def best(self) -> Contenders:
        """Return the remaining candidates that may have the largest value, with fresh scores."""
        found = score_ops.advance(self.state)
        state = self.state
        # If V is a multiple of I, scores are fresh; those of zero features always are.
        if self._rounds and bool((state.score[found] + state.error_bound[found] > 0).any()):
            self.refresh(found)
        return Contenders(found, state.score[found], state.error_bound[found])

    def score(self, index: int) -> float:
        """Return one candidate's score, computed from scratch."""
        # Not by `refresh`: the candidate may be stale, and must remain so.
        phi = self._features.at(torch.tensor([index]))
        return float(self._batch.look(self._information.whiten(phi)).residual.square().sum())

    def refresh(self, indices: Tensor) -> None:
        """Recompute the scores of `indices` from the root of V.

        They must be candidates that `advance` has brought up to date, or that are picked next: the
        inherited errors of the others are not known yet.
        """
        state = self.state
        for part in indices.split(self._features.chunk):
            phi = self._features.at(part)
            look = self._batch.look(self._information.whiten(phi))
            score = look.residual.square().sum(dim=1).cpu()
            error = self._error * self._features.size[part] + state.inherited[part]
            state.score[part] = score
            state.error_bound[part] = 2 * score.sqrt() * error + error.square()
            state.version[part] = state.count
            self._last = part, phi, look

    def learn(self, index: int) -> float:
        """V <- V + phi phi^T for a candidate; return phi^T V^-1 phi with the old V."""
        if self._last is None or index not in (known := self._last[0].tolist()):
            known = [index]
            self.refresh(torch.tensor(known))
        assert self._last is not None
        _, phi, look = self._last
        at = known.index(index)
        return self._learn(phi[at], look.row(at), float(self._features.size[index]))

    def feature(self, index: int) -> Tensor:
        """Return phi of one candidate and the scale of its rounding error, float64 [k + 1]."""
        phi = self._features.at(torch.tensor([index]))[0]
        return torch.cat([phi, self._features.size[index, None].to(phi.device)])

    def learn_feature(self, feature: Tensor) -> float:
        """Like `learn`, for a candidate given by its `feature`; it may be another process's."""
        phi = feature[:-1].to(self._features.device)
        look = self._batch.look(self._information.whiten(phi[None]))
        return self._learn(phi, look.row(0), float(feature[-1]))

    def _learn(self, phi: Tensor, look: Look, size: float) -> float:
        gain = self._batch.append(look)
        w = self._information.pull_back(look.pulled[None])[0] / math.sqrt(1 + gain)
        share = size / math.sqrt(1 + gain)
        self.state.append(w, error=self._w_error * share, turn=self._error * share)
        self._rounds = True
        self._last = None
        if self._n > _BATCH:
            self._picks.append(phi)
            if self._batch.full:
                self._fold()
        return gain

    def _fold(self) -> None:
        """Add the picks of this batch to the information matrix and start a new batch."""
        self._information = copy.deepcopy(self._information)
        self._information.add_many(torch.stack(self._picks))
        self._error = _STAGES * self._information.error_scale()
        self._w_error = self._error * math.sqrt(self._information.kappa / self._information.lam)
        self._batch = BatchRoot(_BATCH, self._features.dim, self._features.device)
        self._picks = []


def root_error(information: InformationMatrix) -> float:
    """Return a bound on the rounding of X phi, over |phi|, as picks are added to V = (X^T X)^-1."""
    # A multiple of the identity does not add to the picks' rounding.
    return (_STAGES if information.count else 1) * information.error_scale()


def first_scores(
    features: PairFeatures, information: InformationMatrix, show_progress: bool | None = False
) -> tuple[Tensor, Tensor]:
    """Return phi^T V^-1 phi of all features and its error bounds: float64 [N] each, on the CPU.

    Raises:
        ActiveDPOError: a score that is not finite.
    """
    if information.count == 0:
        score = information.kappa / information.lam * features.length.square()
        error = root_error(information) * features.size
    else:
        everything = torch.arange(len(features))
        chunks = everything.split(features.chunk)
        parts = [
            _first_part(features, information, part)
            for part in progress_bar(
                show_progress, chunks, total=len(chunks), desc="first scores", unit="chunk"
            )
        ]
        score = torch.cat([features.length[:0], *parts])
        error = root_error(information) * features.reach
    if not bool(score.isfinite().all()):
        raise ActiveDPOError("a feature is too large: its score overflows")
    return score, 2 * score.sqrt() * error + error.square()


def _first_part(features: PairFeatures, information: InformationMatrix, part: Tensor) -> Tensor:
    """Return the scores of some pairs; if several pairs share rows, whiten row by row."""
    rows, place = features.pairs[part].unique(return_inverse=True)
    if len(rows) >= len(part):
        return information.whiten(features.at(part)).square().sum(dim=1).cpu()
    whitened = information.whiten(features.parts(rows))
    difference = whitened[place[:, 0]] - whitened[place[:, 1]]
    return difference.square().sum(dim=1).cpu() / features.pair_divisor[part].square()

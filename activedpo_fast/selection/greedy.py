"""Greedy log-det selection: which pairs tell most about the reward, taken one after another."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.information import InformationMatrix
from activedpo_fast.selection.normalize import Normalize, PairFeatures
from activedpo_fast.selection.signals import History


class Ranking(NamedTuple):
    """Chosen candidate pairs, best first: indices int64 [n] into the pairs, scores float64 [n]."""

    indices: Tensor
    scores: Tensor


def greedy_logdet(
    rows: Tensor,
    pairs: Tensor,
    n: int,
    *,
    lam: float = 1.0,
    kappa: float = 1.0,
    normalize: Normalize = "response",
    history: History | None = None,
    information: InformationMatrix | None = None,
    show_progress: bool | None = None,
) -> Ranking:
    """n times: take the pair with the largest phi^T V^-1 phi, then V <- V + phi phi^T.

    The criterion and batch rule of ActiveDPO (arXiv 2505.19241): V begins as (lam/kappa) I plus
    phi phi^T of the labelled pairs. Each gain log(1 + score) is the growth of log det V.

    Args:
        rows: [R, k] gradient rows of the responses, any floating dtype.
        pairs: int64 [N, 2], candidate pairs of rows.
        n: how many, 0 to N.
        lam, kappa: positive.
        normalize: how a feature is made of two rows, see `PairFeatures`.
        history: (rows [H, k], pairs int64 [t, 2]) that are labelled already, normalised alike.
        information: V to start from (before `history`) in place of (lam/kappa) I; its own lam and
            kappa must be those given. It is updated in place.
        show_progress: a bar over the picks; None shows it on a terminal only.

    Returns:
        Ranking with the scores at the time of each pick (never increasing, but for rounding).
        Pairs whose scores are equal as far as float64 can tell (duplicates among them) are taken
        in the order of their index; pairs with a zero feature come last.

    Raises:
        ActiveDPOError: n outside 0..N, rows that are not finite, shapes that do not fit.
    """
    n = check_n(n, len(pairs))
    features = PairFeatures(rows, pairs, normalize)
    if information is None:
        information = InformationMatrix(features.dim, lam=lam, kappa=kappa, device=rows.device)
    elif (information.lam, information.kappa) != (lam, kappa):
        raise ActiveDPOError(f"information has lam={information.lam}, kappa={information.kappa}, "
                             f"but lam={lam}, kappa={kappa} are asked for")
    if history is not None:
        labelled = PairFeatures(*history, normalize)
        for phi in labelled.chunks(torch.arange(len(labelled), device=labelled.device)):
            information.add_many(phi)

    scores = _Scores(features, information)
    indices, gains = [], []
    disable = None if show_progress is None else not show_progress
    for _ in tqdm(range(n), desc="selecting", unit="pair", disable=disable):
        index, score = scores.best()
        scores.take(index)
        indices.append(index)
        gains.append(score)
    return Ranking(torch.tensor(indices, dtype=torch.int64),
                   torch.tensor(gains, dtype=torch.float64))


def rank_top(scores: Tensor, doubt: Tensor, n: int) -> Ranking:
    """The n largest of scores [N], which are known to within `doubt` [N]; ties to the lowest index.

    A tie is what `doubt` cannot tell from the largest score that is left.
    """
    n = check_n(n, len(scores))
    left = torch.ones_like(scores, dtype=torch.bool)
    indices = []
    for _ in range(n):
        index = int(_contenders(scores, doubt, left)[0])
        left[index] = False
        indices.append(index)
    chosen = torch.tensor(indices, dtype=torch.int64)
    return Ranking(chosen, scores.cpu()[chosen])


def check_n(n: int, available: int) -> int:
    """n as an int; `ActiveDPOError` unless it is an integer from 0 to the number available."""
    try:
        count = operator.index(n)
    except TypeError:
        raise ActiveDPOError(f"n must be an integer, not {n!r}") from None
    if count < 0:
        raise ActiveDPOError(f"n must be 0 or more, not {count}")
    if count > available:
        raise ActiveDPOError(f"{count} pairs are asked for, but there are only {available} "
                             "candidate pairs")
    return count


class _Scores:
    """phi^T V^-1 phi of every candidate while V grows.

    Each pick lowers the scores by (phi . w)^2: cheap, but the rounding adds up, and it may exceed
    the gap between two candidates. So every score carries an estimate of its error, `_doubt`. A
    pick computes the scores of all candidates that could be the largest within these errors afresh
    from V, and takes the lowest index of those that the fresh scores leave tied. In practice that
    is one or two candidates a pick.
    """

    def __init__(self, features: PairFeatures, information: InformationMatrix) -> None:
        self._features = features
        self._information = information
        n = len(features)
        zeros = torch.zeros(n, dtype=torch.float64, device=features.device)
        self._left = torch.ones_like(zeros, dtype=torch.bool)
        self._fresh = torch.zeros_like(self._left)
        self._score = zeros
        self._doubt = zeros.clone()
        self._refresh(torch.arange(n, device=features.device))

    def best(self) -> tuple[int, float]:
        """Index and score of the best candidate left."""
        contenders = _contenders(self._score, self._doubt, self._left)
        stale = contenders[~self._fresh[contenders]]
        if len(stale):
            self._refresh(stale)
            # Among the same candidates: the true best was one of them.
            fresh = _contenders(self._score[contenders], self._doubt[contenders],
                                torch.ones_like(contenders, dtype=torch.bool))
            contenders = contenders[fresh]
        index = int(contenders[0])
        return index, float(self._score[index])

    def take(self, index: int) -> None:
        """Add the candidate to V and lower the others' scores."""
        features, information = self._features, self._information
        self._left[index] = False
        phi = features.at(torch.tensor([index], device=features.device))[0]
        gain = float(self._score[index])
        fall = features.dot(information.add(phi).to(features.device))
        # |w| <= (kappa/lam) |phi| / sqrt(1 + gain), and w's own rounding is relative to that bound.
        scale = information.error_scale() * (information.kappa / information.lam) ** 0.5
        error = scale * float(features.size[index]) / (1 + gain) ** 0.5 * features.reach
        self._doubt += 2 * fall.abs() * error + error.square()
        self._score = (self._score - fall.square()).clamp_(min=0)
        self._fresh[:] = False

    def _refresh(self, indices: Tensor) -> None:
        """Compute the scores of `indices` from V itself."""
        parts = [self._information.score(phi) for phi in self._features.chunks(indices)]
        self._score[indices] = torch.cat(parts).to(self._score.device)
        error = self._information.error_scale() * self._features.size[indices]
        self._doubt[indices] = 2 * self._score[indices].sqrt() * error + error.square()
        self._fresh[indices] = True


def _contenders(scores: Tensor, doubt: Tensor, left: Tensor) -> Tensor:
    """Indices, ascending, of those left that may be the largest given scores +- doubt."""
    threshold = (scores - doubt)[left].max()
    return ((scores + doubt >= threshold) & left).nonzero().flatten()

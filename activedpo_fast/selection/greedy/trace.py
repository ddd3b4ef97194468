"""Greedy V-optimal selection: the pairs most informative about the policy's likely responses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.contest import Contenders, Contest, may_be_best
from activedpo_fast.selection.greedy.running_scores import first_scores
from activedpo_fast.selection.information.labeled import labeled_information
from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.pair_features import PairFeatures
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import History

if TYPE_CHECKING:
    from activedpo_fast.store.rows import StoredRows

_EPS = torch.finfo(torch.float64).eps
_CHUNK_BYTES = 2**26  # bytes of float64 numbers processed at once


def greedy_trace(
    rows: Tensor | StoredRows,
    pairs: Tensor,
    n: int,
    item_of_row: Tensor,
    *,
    lam: float = 1.0,
    kappa: float = 1.0,
    weights: Tensor | None = None,
    history: History | None = None,
    history_weights: Tensor | None = None,
    targets: int = 1024,
    eligible: Eligible | None = None,
    group: dist.ProcessGroup | None = None,
    show_progress: bool | None = None,
) -> Ranking:
    """Repeat n times: take the pair that lowers tr(I V^-1) most, then V <- V + phi phi^T.

    V as in `greedy_logdet`. I = sum of c c^T over the targets, c = g - (mean g of its item): up to
    a factor, the covariance of g over the policy's responses to each prompt, of which the
    candidates are a sample. So tr(I V^-1) is the remaining variance in the rewards of the policy's
    own responses (V-optimality, as in arXiv 2606.19607). With u = V^-1 phi, a pair lowers it by
    |C u|^2 / (1 + phi^T u), which is its score; C [T, k] are the targets. Gains may increase again
    when other pairs are picked.

    C V^-1 G^T is stored for all rows G, [T, R] float64, and every pick updates it: time T R and
    memory 8 T R bytes, plus one read of the rows per pick.

    Args:
        rows, pairs, n, lam, kappa, weights, history, history_weights, eligible, group: as for
            `greedy_logdet`. Features are not normalized.
        item_of_row: int64 [R], the item of each row, from 0.
        targets: the approximate maximum number of target rows: those of every item, or of every
            second, third, ... item.
        show_progress: a bar over the picks; None shows it on terminals only.

    Returns:
        Ranking; pairs that float64 cannot tell apart are in index order.

    Raises:
        ActiveDPOError: as `greedy_logdet`; targets below 1.
    """
    if targets < 1:
        raise ActiveDPOError(f"targets must be 1 or more, not {targets}")
    contest = Contest(len(pairs), n, eligible, group, show_progress)
    _require_no_cost_with_min_score(contest.eligible)

    def prepare() -> tuple[PairFeatures, InformationMatrix]:
        features = PairFeatures(rows, pairs, None, weights)
        labeled = None if history is None else PairFeatures(*history, None, history_weights)
        return features, labeled_information(features, labeled, lam=lam, kappa=kappa)

    features, v = contest.everywhere(prepare)
    everyones_targets = _gather_targets(contest, features, item_of_row, targets, group)
    scores = contest.everywhere(
        lambda: _TraceScores(features, v, everyones_targets, contest.eligible)
    )
    contest.require_same(v)
    indices: list[int] = []
    gains: list[float] = []
    for choice in contest.picks(scores):
        phi = contest.feature(choice, lambda index: features.at(torch.tensor([index]))[0], v.dim)
        scores.learn(phi.to(features.device))
        indices.append(choice.index)
        gains.append(choice.score)
    return Ranking(
        torch.tensor(indices, dtype=torch.int64), torch.tensor(gains, dtype=torch.float64)
    )


def _require_no_cost_with_min_score(eligible: Eligible) -> None:
    # Each pick can change whether a pair reaches min_score, and so the order by cost.
    if eligible.min_score > -math.inf and eligible.inverse_cost is not None:
        raise ActiveDPOError(
            "min_score and cost cannot be combined for the strategies 'trace' and 'trace_plus', "
            "whose scores may increase"
        )


def _gather_targets(
    contest: Contest,
    features: PairFeatures,
    item_of_row: Tensor,
    most: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Return the targets of all processes, float64 [T, k]."""
    processes = PoolProcesses(group)
    n_items = int(item_of_row.max()) + 1 if len(item_of_row) else 0
    sizes = processes.gather(torch.tensor([[len(item_of_row), n_items]]))
    every = -(-int(sizes[:, 0].sum()) // most)
    first = int(sizes[: processes.rank, 1].sum())
    own = contest.everywhere(lambda: _targets(features, item_of_row, first, every))
    return processes.gather(own).to(features.device)


class _TraceScores:
    """|C V^-1 phi|^2 / (1 + phi^T V^-1 phi) of all pairs, updated by each pick.

    Args:
        information: V before the first pick; the picks are added to it.
        targets: C, float64 [T, k].
    """

    def __init__(
        self,
        features: PairFeatures,
        information: InformationMatrix,
        targets: Tensor,
        eligible: Eligible,
    ) -> None:
        self._features, self._information = features, information
        self._targets, self._eligible = targets, eligible
        self._seen = torch.cat(
            [targets @ information.solve(features.parts(part)).T for part in self._parts()]
            or [targets.new_zeros(len(targets), 0)],
            dim=1,
        )  # C V^-1 G^T
        self._reach = torch.cat(
            [self._difference(self._seen, part).square().sum(dim=0).cpu() for part in self._pairs()]
            or [features.length[:0]]
        )
        self._variance, self._variance_error = first_scores(features, information)
        self._picks = 0
        # Bound on |C V^-1|: the scale of the rounding error of products with a feature.
        self._size = float(targets.square().sum().sqrt()) * information.kappa / information.lam

    def best(self) -> Contenders:
        """Return the remaining candidates that may have the largest value."""
        score, error_bound = self._scores(self._eligible.remaining.nonzero().flatten())
        return may_be_best(score, error_bound, self._eligible)

    def score(self, index: int) -> float:
        """Return one candidate's score."""
        return float(self._scores(torch.tensor([index]))[0])

    def learn(self, phi: Tensor) -> None:
        """V <- V + phi phi^T."""
        w = self._information.add(phi)  # the variance of x falls by (x . w)^2
        target = self._targets @ w
        row = torch.cat(
            [self._features.parts(part) @ w for part in self._parts()] or [w.new_zeros(0)]
        )
        along = self._seen.T @ target  # component of each row's column along the change
        for part in self._pairs():
            share = self._difference(row, part).cpu()
            before = self._difference(along, part).cpu()
            self._reach[part] += share * (share * float(target @ target) - 2 * before)
            self._variance[part] -= share.square()
        self._reach.clamp_(min=0)
        self._variance.clamp_(min=0)
        self._seen.addr_(target, row, alpha=-1)
        self._picks += 1

    def _scores(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and bounds on their errors, float64 each."""
        reach, variance = self._reach[indices], self._variance[indices]
        scale = (16 + 4 * math.sqrt(self._features.dim)) * _EPS * (1 + self._picks)
        error = scale * self._size * self._features.reach[indices]
        score = reach / (1 + variance)
        of_reach = 2 * reach.sqrt() * error + error.square()
        of_variance = self._variance_error[indices] + scale * variance
        return score, of_reach / (1 + variance) + score * of_variance / (1 + variance)

    def _difference(self, columns: Tensor, numbers: Tensor) -> Tensor:
        """Return differences of pairs along the last dimension, times the pairs' weights."""
        first, second = self._features.pairs[numbers].to(columns.device).unbind(1)
        divisor = self._features.pair_divisor[numbers].to(columns.device)
        return (columns[..., first] - columns[..., second]) / divisor

    def _parts(self) -> Iterator[Tensor]:
        """Yield row numbers, a bounded number at a time."""
        yield from _split(len(self._features.rows), self._features.dim)

    def _pairs(self) -> Iterator[Tensor]:
        """Yield pair numbers, a bounded number at a time."""
        yield from _split(len(self._features), len(self._targets))


def _targets(features: PairFeatures, item_of_row: Tensor, first: int, every: int) -> Tensor:
    """Return rows of each `every`-th item minus the mean of their item, float64 [T, k].

    `first` is the number of this process's first item among those of all processes.
    """
    chosen = ((item_of_row + first) % every == 0).nonzero().flatten()
    rows = features.parts(chosen)
    items, place = item_of_row[chosen].unique(return_inverse=True)
    place = place.to(rows.device)
    sums = rows.new_zeros(len(items), features.dim).index_add_(0, place, rows)
    return rows - (sums / torch.bincount(place, minlength=len(items))[:, None])[place]


def _split(count: int, width: int) -> Iterator[Tensor]:
    """Yield 0..count-1 in chunks for which rows of `width` float64 numbers fit."""
    if count:
        yield from torch.arange(count).split(max(1, _CHUNK_BYTES // (8 * max(1, width))))

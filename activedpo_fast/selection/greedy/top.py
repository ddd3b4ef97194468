"""The largest of fixed scores, under the rules of a selection."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.contest import Contenders, Contest, may_be_best
from activedpo_fast.selection.ranking import Ranking


def rank_top(
    scores: Tensor,
    error_bound: Tensor,
    n: int,
    eligible: Eligible | None = None,
    group: dist.ProcessGroup | None = None,
) -> Ranking:
    """Return the n largest of scores [N], known to within `error_bound` [N]; ties by lowest index.

    Candidates that `error_bound` cannot tell from the largest one remaining are tied. With
    `eligible`, the compared value is score * inverse_cost and its rules apply; fewer than n may
    come back then. `group` as for `greedy_logdet`.
    """
    contest = Contest(len(scores), n, eligible, group)
    picks = list(contest.picks(_FixedScores(scores.cpu(), error_bound.cpu(), contest.eligible)))
    return Ranking(
        torch.tensor([pick.index for pick in picks], dtype=torch.int64),
        torch.tensor([pick.score for pick in picks], dtype=torch.float64),
    )


class _FixedScores:
    """Scores that picks do not change."""

    def __init__(self, score: Tensor, error_bound: Tensor, eligible: Eligible) -> None:
        self._score, self._error_bound = score, error_bound
        self._eligible = eligible

    def best(self) -> Contenders:
        remaining = self._eligible.remaining
        return may_be_best(self._score[remaining], self._error_bound[remaining], self._eligible)

    def score(self, index: int) -> float:
        return float(self._score[index])

"""Greedy log-det selection: the pairs most informative about the reward, one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from activedpo_fast.distributed.processes import Choice
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.contest import Contest
from activedpo_fast.selection.greedy.resident import (
    at_its_place,
    greedy_resident,
    on_gpu,
    picks_there,
)
from activedpo_fast.selection.greedy.running_scores import RunningScores
from activedpo_fast.selection.information.labeled import labeled_information
from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.pair_features import Normalize, PairFeatures
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import History

if TYPE_CHECKING:
    from activedpo_fast.store.rows import StoredRows


def greedy_logdet(
    rows: Tensor | StoredRows,
    pairs: Tensor,
    n: int,
    *,
    lam: float = 1.0,
    kappa: float = 1.0,
    normalize: Normalize = "response",
    weights: Tensor | None = None,
    history: History | None = None,
    history_weights: Tensor | None = None,
    eligible: Eligible | None = None,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    show_progress: bool | None = None,
) -> Ranking:
    """Repeat n times: take the pair with the largest phi^T V^-1 phi, then V <- V + phi phi^T.

    The criterion and batch rule of ActiveDPO (arXiv 2505.19241): V starts as (lam/kappa) I plus
    phi phi^T of the labeled pairs. Each gain log(1 + score) is the increase of log det V.

    The picks are the same as those of the plain algorithm, which computes every score for every
    pick, but most rows are read only a few times: see `RunningScores`.

    Args:
        rows: [R, k] gradient rows of the responses, any floating dtype; in memory, or `StoredRows`
            that stay on disk.
        pairs: int64 [N, 2], candidate pairs of rows.
        n: number of picks, 0 to N.
        lam, kappa: positive.
        normalize, weights: how a feature is computed from two rows, see `PairFeatures`.
        history: (rows [H, k], pairs int64 [t, 2]) that are already labeled, normalized the same
            way, with `history_weights` float64 [t].
        eligible: which candidates may be picked and how scores are compared; see `PickRules.bind`.
            Fewer than n pairs come back if it leaves no more.
        group: processes that make one selection together, each with its share of the rows and
            pairs (and of `eligible`); all other arguments are the same in all of them. Candidates
            are numbered consecutively, process after process, and all get the picks that one
            process with all the candidates would make.
        device: a GPU that rows in memory are moved to first, if our kernel can make the picks there
            and it has room for them; not with `group`.
        show_progress: bars over first scores and picks; None shows them on terminals only.

    Returns:
        Ranking with the scores at the time of each pick (never increasing, except for rounding and
        rules). Pairs whose values are equal as far as float64 can tell (including duplicates) are
        taken in index order; pairs with a zero feature come last.

    Raises:
        ActiveDPOError: n outside 0..N, rows that are not finite, shapes that do not fit; another
            process of the group failed, was lost or has other settings. Nothing is selected then.
    """
    contest = Contest(len(pairs), n, eligible, group, show_progress)

    def prepare() -> tuple[PairFeatures, InformationMatrix]:
        features = PairFeatures(rows, pairs, normalize, weights, contest.show_progress)
        labeled = None if history is None else PairFeatures(*history, normalize, history_weights)
        return features, labeled_information(features, labeled, lam=lam, kappa=kappa)

    if isinstance(rows, Tensor):
        rows = at_its_place(rows, device or rows.device, alone=group is None)
        if group is None and picks_there(rows.device, rows.dtype):
            features, v = prepare()
            return greedy_resident(
                features, v, contest.eligible, contest.n, on_gpu, contest.show_progress
            )

    def start() -> tuple[RunningScores, InformationMatrix]:
        features, v = prepare()
        scores = RunningScores(features, v, contest.eligible, contest.n, contest.show_progress)
        return scores, v

    scores, v = contest.everywhere(start)
    contest.require_same(v)
    return _pick_all(contest, scores, v.dim)


def _pick_all(contest: Contest, scores: RunningScores, dim: int) -> Ranking:
    def learn(choice: Choice) -> float:
        if contest.processes is None:
            return scores.learn(choice.index)
        return scores.learn_feature(contest.feature(choice, scores.feature, dim + 1))

    indices: list[int] = []
    gains: list[float] = []
    touched = [0]
    for choice in contest.picks(scores):
        gains.append(learn(choice))
        indices.append(choice.index)
        touched.append(scores.touched)
    read = torch.tensor(touched).diff()
    return Ranking(
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor(gains, dtype=torch.float64),
        read if contest.processes is None else contest.processes.sum(read),
    )

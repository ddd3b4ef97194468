"""Greedy log-det selection: the pairs most informative about the reward, one after another."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from activedpo_fast.distributed.processes import Choice, Offer, Processes
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import backends
from activedpo_fast.progress import progress_bar
from activedpo_fast.selection.greedy.one_launch import at_its_place, greedy_resident, on_gpu
from activedpo_fast.selection.greedy.running_scores import Contenders, RunningScores
from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.pair_features import Normalize, PairFeatures
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.rules import Eligible
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
    information: InformationMatrix | None = None,
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
        information: V to start from (before `history`) in place of (lam/kappa) I; its lam and kappa
            must equal those given. It is updated in place.
        eligible: which candidates may be picked and how scores are compared; see `PickRules.bind`.
            Fewer than n pairs come back if it leaves no more.
        group: processes that make one selection together, each with its share of the rows and
            pairs (and of `eligible`); all other arguments are the same in all of them. Candidates
            are numbered consecutively, rank after rank, and all processes get the picks that one
            process with all the candidates would make.
        device: a GPU that rows in memory are moved to first, if it can make all picks in one launch
            and has room for them; not with `group`.
        show_progress: bars over first scores and picks; None shows them on terminals only.

    Returns:
        Ranking with the scores at the time of each pick (never increasing, except for rounding and
        rules). Pairs whose values are equal as far as float64 can tell (including duplicates) are
        taken in index order; pairs with a zero feature come last.

    Raises:
        ActiveDPOError: n outside 0..N, rows that are not finite, shapes that do not fit; another
            process of the group failed, was lost or has other settings. Nothing is selected then.
    """
    processes = None if group is None else Processes(group, len(pairs))
    n = check_n(n, len(pairs) if processes is None else processes.total)
    allowed = Eligible.everything(len(pairs)) if eligible is None else eligible
    show = False if processes is not None and processes.rank > 0 else show_progress

    def prepare() -> tuple[PairFeatures, InformationMatrix]:
        features = PairFeatures(rows, pairs, normalize, weights, show)
        v = information
        if v is None:
            v = InformationMatrix(features.dim, lam=lam, kappa=kappa, device=rows.device)
        elif (v.lam, v.kappa) != (lam, kappa):
            raise ActiveDPOError(
                f"information has lam={v.lam}, kappa={v.kappa}, but lam={lam}, "
                f"kappa={kappa} are asked for"
            )
        if history is not None:
            add_all(v, PairFeatures(*history, normalize, history_weights))
        return features, v

    def start() -> tuple[RunningScores, InformationMatrix]:
        features, v = prepare()
        return RunningScores(features, v, allowed, n, show), v

    if processes is None and isinstance(rows, Tensor):
        rows = at_its_place(rows, device or rows.device)
        if backends.choose("greedy_select", rows.device.type, rows.dtype) == "cuda":
            features, v = prepare()
            ranking = greedy_resident(features, v, allowed, n, on_gpu, show)
            if information is not None:
                add_all(v, features, ranking.indices)
            return ranking

    scores, v = start() if processes is None else processes.check(start)
    if processes is not None:
        processes.require_same(
            {
                "n": n,
                "k": v.dim,
                "lam": lam,
                "kappa": kappa,
                "log det V": v.logdet(),
                "random picks": allowed.n_random,
                "min_score": allowed.min_score,
            }
        )

    kept: list[Tensor] = []

    def take(choice: Choice) -> float:
        if processes is None and information is None:
            return scores.take(choice.index)
        offset, rank = (0, 0) if processes is None else (processes.offset, processes.rank)
        feature = scores.feature(choice.index - offset) if choice.owner == rank else None
        if processes is not None:
            feature = processes.share(feature, v.dim + 1, choice.owner)
        assert feature is not None
        kept.append(feature[:-1])
        return scores.learn(feature)

    touched = [0]
    indices, gains = [], []
    with progress_bar(show, total=n, desc="selecting", unit="pair") as bar:
        for choice in choices(scores, n, allowed, processes):
            gains.append(take(choice))
            indices.append(choice.index)
            touched.append(scores.touched)
            bar.update()
    if information is not None and kept:
        information.add_many(torch.stack(kept))
    looked = torch.tensor(touched).diff()
    return Ranking(
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor(gains, dtype=torch.float64),
        looked if processes is None else processes.sum(looked),
    )


def rank_top(
    scores: Tensor,
    doubt: Tensor,
    n: int,
    eligible: Eligible | None = None,
    group: dist.ProcessGroup | None = None,
) -> Ranking:
    """Return the n largest of scores [N], each known to within `doubt` [N]; ties by lowest index.

    Candidates that `doubt` cannot tell from the largest one left are tied. With `eligible`, the
    compared value is score * inverse_cost and its rules apply; fewer than n may come back then.
    `group` as for `greedy_logdet`.
    """
    processes = None if group is None else Processes(group, len(scores))
    n = check_n(n, len(scores) if processes is None else processes.total)
    eligible = Eligible.everything(len(scores)) if eligible is None else eligible
    made = list(choices(_FixedScores(scores, doubt, eligible), n, eligible, processes))
    return Ranking(
        torch.tensor([choice.index for choice in made], dtype=torch.int64),
        torch.tensor([choice.score for choice in made], dtype=torch.float64),
    )


def add_all(
    information: InformationMatrix, features: PairFeatures, indices: Tensor | None = None
) -> None:
    """V <- V + phi phi^T over `features`, all of them or those of int64 `indices`."""
    for phi in features.chunks(torch.arange(len(features)) if indices is None else indices):
        information.add_many(phi)


def check_n(n: int, available: int) -> int:
    """Return n as an int; raise `ActiveDPOError` unless it is an integer from 0 to `available`."""
    try:
        count = operator.index(None if isinstance(n, bool) else n)  # type: ignore[arg-type]
    except TypeError:
        raise ActiveDPOError(f"n must be an integer, not {n!r}") from None
    if count < 0:
        raise ActiveDPOError(f"n must be 0 or more, not {count}")
    if count > available:
        raise ActiveDPOError(
            f"{count} pairs are asked for, but there are only {available} candidate pairs"
        )
    return count


class Scores(Protocol):
    """The interface that `choices` needs from scores; the caller keeps them up to date."""

    def best(self) -> Contenders:
        """Return the candidates that may have the largest value of all that may be picked."""

    def score(self, index: int) -> float:
        """Return one candidate's score."""


def choices(
    scores: Scores, n: int, eligible: Eligible, processes: Processes | None
) -> Iterator[Choice]:
    """Yield the picks, one after another, as the rules allow; the caller updates the scores."""
    taken = 0
    while taken < n:
        drawn = taken < eligible.n_random
        search = _Draw(scores, eligible) if drawn else _Best(scores, eligible)
        if processes is not None:
            choice = processes.agree(search.offer, search.lowest_from)
        else:
            offer = search.offer()
            choice = (
                None
                if offer is None
                else Choice(offer.index, offer.score, offer.group, offer.prompt, 0)
            )
        if choice is None:
            return
        mine = processes is None or choice.owner == processes.rank
        index = choice.index - (0 if processes is None else processes.offset)
        if not drawn and choice.score < eligible.min_score:
            if eligible.inverse_cost is None:
                return
            # A costlier one may have a higher score. This one will not: scores only fall.
            if mine:
                eligible.left[index] = False
            continue
        yield choice
        taken += 1
        if mine:
            eligible.take(index)
        else:
            eligible.taken_elsewhere(choice.group, choice.prompt)


class _Draw:
    """The candidate that comes first in the random order."""

    def __init__(self, scores: Scores, eligible: Eligible) -> None:
        self._scores, self._eligible = scores, eligible

    def offer(self) -> Offer | None:
        left = self._eligible.left.nonzero().flatten()
        if not len(left):
            return None
        assert self._eligible.random_order is not None
        order, place = self._eligible.random_order[left].min(dim=0)
        index = int(left[place])
        value = -float(order)
        return Offer(
            index,
            self._scores.score(index),
            self._eligible.group_of(index),
            self._eligible.prompt_of(index),
            value,
            value,
            value,
        )

    def lowest_from(self, value: float) -> Offer | None:
        offer = self.offer()
        return offer if offer is not None and offer.upper >= value else None


class _Best:
    """The candidate with the largest value, ties to the lowest index."""

    def __init__(self, scores: Scores, eligible: Eligible) -> None:
        self._scores, self._eligible = scores, eligible
        self._best: Contenders | None = None

    def offer(self) -> Offer | None:
        self._best = self._scores.best()
        return self._first_of(self._best)

    def lowest_from(self, value: float) -> Offer | None:
        return None if self._best is None else self._first_of(self._best, value)

    def _first_of(self, best: Contenders, least: float = -math.inf) -> Offer | None:
        """Offer the first one that may be the best and whose upper bound is at least `least`."""
        indices = best.indices.tolist()
        scale = self._eligible.inverse_cost
        factor = [1.0] * len(indices) if scale is None else scale[best.indices].tolist()
        scores, doubts = best.score.tolist(), best.doubt.tolist()
        upper = [(s + d) * f for s, d, f in zip(scores, doubts, factor, strict=True)]
        lower = [(s - d) * f for s, d, f in zip(scores, doubts, factor, strict=True)]
        least = max(least, max(lower, default=least))
        reaching = [at for at, bound in enumerate(upper) if bound >= least]
        if not reaching:
            return None
        first = reaching[0]
        index = indices[first]
        return Offer(
            index,
            scores[first],
            self._eligible.group_of(index),
            self._eligible.prompt_of(index),
            max(lower[at] for at in reaching),
            upper[first],
            max(upper[at] for at in reaching),
        )


class _FixedScores:
    """Scores that picks do not change."""

    def __init__(self, scores: Tensor, doubt: Tensor, eligible: Eligible) -> None:
        self._score, self._doubt = scores.cpu(), doubt.cpu()
        self._eligible = eligible

    def best(self) -> Contenders:
        """Return the candidates left that may have the largest value."""
        left = self._eligible.left.nonzero().flatten()
        scale = self._eligible.inverse_cost
        score, doubt = self._score[left], self._doubt[left]
        factor = torch.ones_like(score) if scale is None else scale[left]
        lower = (score - doubt) * factor
        among = (score + doubt) * factor >= (lower.max() if len(left) else 0.0)
        return Contenders(left[among], score[among], doubt[among])

    def score(self, index: int) -> float:
        return float(self._score[index])

"""Which candidate is picked next: the best, or one drawn at random; by one process or several."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from activedpo_fast.distributed.processes import Choice, Offer, Processes
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.progress import progress_bar
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.information.matrix import InformationMatrix

Result = TypeVar("Result")


class Contenders(NamedTuple):
    """Candidates that include the best one, with fresh scores.

    indices: int64 [m], ascending. score, error_bound: float64 [m]; the score's error is at most
    error_bound.
    """

    indices: Tensor
    score: Tensor
    error_bound: Tensor


class Scores(Protocol):
    """The interface that a contest needs from scores; the caller keeps them up to date."""

    def best(self) -> Contenders:
        """Return the candidates that may have the largest value of all that may be picked."""

    def score(self, index: int) -> float:
        """Return one candidate's score."""


class Contest:
    """n picks, one after another, as the rules allow.

    Args:
        n_candidates: the number of candidates of this process.
        n: the number of picks, 0 to the number of candidates of all processes.
        eligible: which of this process's candidates may be picked; None for all.
        group: the processes that pick together; None for a single one.
        show_progress: a bar over the picks, in the first process.

    Attributes:
        n, eligible: as given. processes: None for a single process.
        show_progress: False in processes other than the first.

    Raises:
        ActiveDPOError: see `check_n`; a process was lost.
    """

    def __init__(
        self,
        n_candidates: int,
        n: int,
        eligible: Eligible | None,
        group: dist.ProcessGroup | None,
        show_progress: bool | None = False,
    ) -> None:
        self.processes = None if group is None else Processes(group, n_candidates)
        total = n_candidates if self.processes is None else self.processes.total
        self.n = check_n(n, total)
        self.eligible = Eligible.everything(n_candidates) if eligible is None else eligible
        first = self.processes is None or self.processes.rank == 0
        self.show_progress = show_progress if first else False

    def everywhere(self, prepare: Callable[[], Result]) -> Result:
        """Return the result of `prepare`; if it raises in one process, all of them raise."""
        return prepare() if self.processes is None else self.processes.check(prepare)

    def require_same(self, information: InformationMatrix) -> None:
        """Raise `ActiveDPOError` unless all processes make the same picks from the same V."""
        if self.processes is None:
            return
        self.processes.require_same(
            {
                "n": self.n,
                "k": information.dim,
                "lam": information.lam,
                "kappa": information.kappa,
                "log det V": information.logdet(),
                "random picks": self.eligible.n_random,
                "min_score": self.eligible.min_score,
            }
        )

    def picks(self, scores: Scores) -> Iterator[Choice]:
        """Yield the picks; the caller updates `scores` after each."""
        eligible = self.eligible
        picked = 0
        with progress_bar(self.show_progress, total=self.n, desc="selecting", unit="pair") as bar:
            while picked < self.n:
                drawn = picked < eligible.n_random
                choice = self._agree(_Draw(scores, eligible) if drawn else _Best(scores, eligible))
                if choice is None:
                    return
                own = self.own_index(choice)
                if not drawn and choice.score < eligible.min_score:
                    if eligible.inverse_cost is None:
                        return
                    # A costlier one may have a higher score. This one will not: scores only fall.
                    if own is not None:
                        eligible.remaining[own] = False
                    continue
                yield choice
                picked += 1
                if own is None:
                    eligible.record_elsewhere(choice.quota_group, choice.prompt)
                else:
                    eligible.record_pick(own)
                bar.update()

    def own_index(self, choice: Choice) -> int | None:
        """Return a pick's number among this process's candidates; None for another process's."""
        if self.processes is None:
            return choice.index
        if choice.owner != self.processes.rank:
            return None
        return choice.index - self.processes.offset

    def feature(self, choice: Choice, of: Callable[[int], Tensor], size: int) -> Tensor:
        """Return `of` a pick, float64 [size], in all processes; its owner computes it."""
        own = self.own_index(choice)
        computed = None if own is None else of(own)
        if self.processes is not None:
            return self.processes.share(computed, size, choice.owner)
        assert computed is not None
        return computed

    def _agree(self, search: _Draw | _Best) -> Choice | None:
        if self.processes is not None:
            return self.processes.agree(search.offer, search.lowest_from)
        offer = search.offer()
        if offer is None:
            return None
        return Choice(offer.index, offer.score, offer.quota_group, offer.prompt, owner=0)


def check_n(n: int, available: int | None) -> int:
    """Return n as an int; raise `ActiveDPOError` unless it is an integer from 0 to `available`.

    With None, it may be any from 0.
    """
    try:
        count = operator.index(None if isinstance(n, bool) else n)  # type: ignore[arg-type]
    except TypeError:
        raise ActiveDPOError(f"n must be an integer, not {n!r}") from None
    if count < 0:
        raise ActiveDPOError(f"n must be 0 or more, not {count}")
    if available is not None and count > available:
        raise ActiveDPOError(
            f"{count} pairs are asked for, but there are only {available} candidate pairs"
        )
    return count


def may_be_best(score: Tensor, error_bound: Tensor, eligible: Eligible) -> Contenders:
    """Return the contenders among the remaining candidates, whose scores [m] are given."""
    remaining = eligible.remaining.nonzero().flatten()
    factor = eligible.factors(remaining)
    lower, upper = (score - error_bound) * factor, (score + error_bound) * factor
    among = upper >= (lower.max() if len(remaining) else 0.0)
    return Contenders(remaining[among], score[among], error_bound[among])


class _Draw:
    """The candidate that comes first in the random order."""

    def __init__(self, scores: Scores, eligible: Eligible) -> None:
        self._scores, self._eligible = scores, eligible

    def offer(self) -> Offer | None:
        remaining = self._eligible.remaining.nonzero().flatten()
        if not len(remaining):
            return None
        assert self._eligible.random_order is not None
        order, place = self._eligible.random_order[remaining].min(dim=0)
        index = int(remaining[place])
        value = -float(order)
        return _offer(
            self._eligible, index, self._scores.score(index), lower=value, upper=value, top=value
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
        factor = self._eligible.factors(best.indices)
        upper = ((best.score + best.error_bound) * factor).tolist()
        lower = ((best.score - best.error_bound) * factor).tolist()
        least = max(least, max(lower, default=least))
        reaching = [at for at, bound in enumerate(upper) if bound >= least]
        if not reaching:
            return None
        first = reaching[0]
        return _offer(
            self._eligible,
            int(best.indices[first]),
            float(best.score[first]),
            lower=max(lower[at] for at in reaching),
            upper=upper[first],
            top=max(upper[at] for at in reaching),
        )


def _offer(
    eligible: Eligible, index: int, score: float, *, lower: float, upper: float, top: float
) -> Offer:
    quota_group, prompt = eligible.quota_group_of(index), eligible.prompt_of(index)
    return Offer(index, score, quota_group, prompt, lower, upper, top)

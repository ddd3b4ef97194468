"""One label for each pair from the answers of several labelers: majority, or Dawid and Skene."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from activedpo_fast.labels.reading import SKIP

TIE = "tie"
Label = int | str  # 0, 1, TIE or SKIP
Votes = Mapping[str, Label]  # the answers to one pair, by labeler

_SAME = 1e-9  # posteriors closer than this do not decide


@dataclass(frozen=True)
class CombinedLabel:
    """The label of a pair, from all answers to it.

    Attributes:
        label: 0 or 1, the position of the preferred response, "tie" or "skip".
        weight: how certain it is, from 0 to 1: its share of the votes, or its posterior.
        split: two labels are equally likely, which is why `label` is "tie".
    """

    label: Label
    weight: float
    split: bool = False


def majority(answers: Sequence[Votes]) -> list[CombinedLabel | None]:
    """Return for each pair the label with the most votes, and its share of them as the weight.

    "skip" is no vote; a pair that all labelers skipped is "skip". If two labels have the most
    votes, the pair is a "tie" and `split`. None for a pair without answers.

    Examples:
        >>> from activedpo_fast.labels.combine import majority
        >>> votes = [{"ann": 0, "ben": 0, "cleo": 1}, {"ann": 0, "ben": 1}]
        >>> [(label.label, round(label.weight, 2), label.split) for label in majority(votes)]
        [(0, 0.67, False), ('tie', 0.5, True)]
    """
    found = []
    for votes in answers:
        counts = Counter(label for label in votes.values() if label != SKIP)
        shares = {label: count / counts.total() for label, count in counts.items()}
        found.append(_decided(shares, votes))
    return found


@dataclass(frozen=True)
class DawidSkene:
    """The model of Dawid and Skene, fitted to answers.

    Attributes:
        classes: the C labels that occur, 0 and 1 first.
        posterior: float64 [pairs, C], the probability of each label; rows without a vote are the
            prior.
        prior: float64 [C], how frequent each label is.
        confusion: for each labeler float64 [C, C]: row c holds the probabilities of the answers to
            a pair whose label is c.
    """

    classes: tuple[Label, ...]
    posterior: numpy.ndarray
    prior: numpy.ndarray
    confusion: dict[str, numpy.ndarray]


def fit_dawid_skene(
    answers: Sequence[Votes],
    *,
    steps: int = 500,
    tolerance: float = 1e-10,
    pseudo_count: float = 0.01,
) -> DawidSkene:
    """Fit the labelers' confusion matrices and the pairs' labels together, by EM from the majority.

    Source: Dawid and Skene, "Maximum likelihood estimation of observer error-rates using the EM
    algorithm", 1979. "skip" counts as no answer.

    Args:
        answers: for each pair its answers by labeler.
        steps: most EM steps; it ends sooner when no posterior moves by more than `tolerance`.
        pseudo_count: added to every count, so that no probability is 0.
    """
    labelers = sorted({name for votes in answers for name in votes})
    classes: tuple[Label, ...] = (0, 1)
    if any(label == TIE for votes in answers for label in votes.values()):
        classes = (0, 1, TIE)
    # Pairs with the same votes have the same posterior: there are few patterns of votes.
    patterns: dict[frozenset[tuple[str, Label]], int] = {}
    of_pair = [
        patterns.setdefault(frozenset(_without_skips(votes).items()), len(patterns))
        for votes in answers
    ]
    times = numpy.bincount(of_pair, minlength=len(patterns))[:, None]
    # One-hot: given[labeler, pattern, class]
    given = numpy.zeros((len(labelers), len(patterns), len(classes)))
    for pattern, n in patterns.items():
        for name, label in pattern:
            given[labelers.index(name), n, classes.index(label)] = 1.0
    votes_of = given.sum(0) + 1e-12  # a pair without votes starts at equal shares
    posterior = votes_of / votes_of.sum(1, keepdims=True)
    for _ in range(steps):
        counts = times * posterior
        prior = counts[given.any((0, 2))].sum(0) + pseudo_count
        prior /= prior.sum()
        confusion = numpy.einsum("nc,lnd->lcd", counts, given) + pseudo_count
        confusion /= confusion.sum(2, keepdims=True)
        log_joint = numpy.log(prior) + numpy.einsum("lnd,lcd->nc", given, numpy.log(confusion))
        log_joint -= log_joint.max(1, keepdims=True, initial=-numpy.inf)
        updated = numpy.exp(log_joint)
        updated /= updated.sum(1, keepdims=True)
        moved = numpy.abs(updated - posterior).max(initial=0.0)
        posterior = updated
        if moved <= tolerance:
            break
    posterior = posterior[numpy.asarray(of_pair, int)]
    return DawidSkene(classes, posterior, prior, dict(zip(labelers, confusion, strict=True)))


def dawid_skene(answers: Sequence[Votes]) -> list[CombinedLabel | None]:
    """Return for each pair the most probable label, and its posterior as the weight.

    Labelers who often differ from the others count less (see `fit_dawid_skene`). The model is
    fitted to the pairs with two answers or more: nothing else says how often a labeler errs. A
    pair's only answer is its label, with its posterior as the weight, or 1 if its labeler shares no
    pair with another. Otherwise as `majority`.

    Examples:
        >>> from activedpo_fast.labels.combine import dawid_skene
        >>> votes = [{"ann": n % 2, "ben": n % 2, "cleo": 0} for n in range(20)]
        >>> combined = dawid_skene([*votes, {"ann": 1, "cleo": 0}])
        >>> combined[-1].label, combined[-1].weight > 0.9  # cleo always answers 0
        (1, True)
    """
    several = [votes for votes in answers if len(_without_skips(votes)) > 1]
    fitted = fit_dawid_skene(several)
    posteriors = iter(fitted.posterior.tolist())
    found: list[CombinedLabel | None] = []
    for votes in answers:
        given = _without_skips(votes)
        if len(given) == 1:
            found.append(_only_answer(*given.popitem(), fitted))
        else:
            shares = dict(zip(fitted.classes, next(posteriors), strict=True)) if given else {}
            found.append(_decided(shares, votes))
    return found


def _only_answer(labeler: str, label: Label, fitted: DawidSkene) -> CombinedLabel:
    if labeler not in fitted.confusion or label not in fitted.classes:
        return CombinedLabel(label, 1.0)
    n = fitted.classes.index(label)
    joint = fitted.prior * fitted.confusion[labeler][:, n]
    return CombinedLabel(label, float(joint[n] / joint.sum()))


def _without_skips(votes: Votes) -> dict[str, Label]:
    return {name: label for name, label in votes.items() if label != SKIP}


def _decided(shares: Mapping[Label, float], votes: Votes) -> CombinedLabel | None:
    if not shares:
        return CombinedLabel(SKIP, 1.0) if votes else None
    most = max(shares.values())
    best = [label for label, share in shares.items() if most - share <= _SAME]
    if len(best) > 1:
        return CombinedLabel(TIE, most, split=True)
    return CombinedLabel(best[0], most)


COMBINERS: dict[str, Callable[[Sequence[Votes]], list[CombinedLabel | None]]] = {
    "majority": majority,
    "dawid-skene": dawid_skene,
}

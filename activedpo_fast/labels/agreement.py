"""How far labelers agree beyond chance: Cohen's kappa and Krippendorff's alpha."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import permutations


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Return Cohen's kappa of two labelers' answers to the same pairs, in the same order.

    kappa = (p_o - p_e) / (1 - p_e): p_o is the share of pairs with the same answer, p_e the share
    expected from how often each labeler gives each answer. 1 is full agreement, 0 is chance.
    Source: Cohen, "A coefficient of agreement for nominal scales", 1960.

    Returns:
        None if it is not defined: no pair, or both always give one and the same answer.

    Examples:
        >>> from activedpo_fast.labels.agreement import cohen_kappa
        >>> round(cohen_kappa([0, 0, 1, 1], [0, 1, 1, 1]), 2)
        0.5
    """
    total = len(first)
    if not total:
        return None
    same = sum(a == b for a, b in zip(first, second, strict=True))
    counts, others = Counter(first), Counter(second)
    by_chance = sum(counts[answer] * others[answer] for answer in counts)  # times total squared
    if by_chance == total**2:
        return None
    return (total * same - by_chance) / (total**2 - by_chance)


def krippendorff_alpha(answers: Sequence[Sequence[Hashable]]) -> float | None:
    """Return Krippendorff's alpha for nominal data; labelers may have left pairs out.

    alpha = 1 - D_o / D_e, observed over expected disagreement. Source: Krippendorff, "Computing
    Krippendorff's Alpha-Reliability", 2011, section D.

    Args:
        answers: for each pair the answers to it, by whomever. Pairs with fewer than two are
            ignored.

    Returns:
        None if it is not defined: no pair has two answers, or all answers are the same.

    Examples:
        >>> from activedpo_fast.labels.agreement import krippendorff_alpha
        >>> round(krippendorff_alpha([[0, 0, 0], [0, 1], [1, 1], [1]]), 2)
        0.5
    """
    coincidences: Counter[tuple[Hashable, Hashable]] = Counter()
    for given in answers:
        for two in permutations(given, 2):
            coincidences[two] += 1 / (len(given) - 1)  # type: ignore[assignment]
    totals: Counter[Hashable] = Counter()
    for (answer, _), count in coincidences.items():
        totals[answer] += count
    n = sum(totals.values())
    expected = n**2 - sum(count**2 for count in totals.values())
    if len(totals) < 2:
        return None
    observed = sum(count for (a, b), count in coincidences.items() if a != b)
    return 1 - (n - 1) * observed / expected

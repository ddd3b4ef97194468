"""What was picked, beside the pool it was picked from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from activedpo_fast.report.labels import text_length
from activedpo_fast.report.reading import LabeledPick, RoundData, RunData


@dataclass(frozen=True)
class Measure:
    """A length of pairs in characters: of all candidate pairs of the pools, and of the picks."""

    name: str
    pool: list[int]
    picks: list[int]

    def row(self) -> list[str]:
        return [self.name, _spread(self.pool), _spread(self.picks)]


def measures(run: RunData) -> list[Measure]:
    """Return the lengths of a run's pairs; none of a run whose pools cannot be read."""
    picked = [_lengths(pick) for pick in run.picks]
    offered = [lengths for data in run.rounds for lengths in _candidates(data)]
    if not picked or not offered:
        return []
    names = ("prompt", "mean of the two responses", "difference of the two responses")
    return [
        Measure(name, [pair[n] for pair in offered], [pair[n] for pair in picked])
        for n, name in enumerate(names)
    ]


def extremes(run: RunData, n: int = 10) -> tuple[list[LabeledPick], list[LabeledPick]]:
    """Return the picks with the `n` highest and the `n` lowest scores, none of them twice.

    If all scores are the same (`random` has none), the first `n` picks, and no others.
    """
    picks = run.picks
    if len({pick.pick.score for pick in picks}) < 2:
        return picks[:n], []
    ranked = sorted(picks, key=lambda pick: -pick.pick.score)
    return ranked[:n], ranked[n:][::-1][:n]


def prompts_picked(run: RunData) -> tuple[int, int]:
    """Return how many different prompts were picked from, and how many were offered."""
    offered = {item.id for data in run.rounds if data.pool is not None for item in data.pool}
    return len({pick.pick.id for pick in run.picks}), len(offered)


def _candidates(data: RoundData) -> list[tuple[int, int, int]]:
    found = []
    for item in data.pool or ():
        prompt = text_length(item.prompt)
        for a, b in combinations(map(text_length, item.responses), 2):
            found.append((prompt, (a + b) // 2, abs(a - b)))
    return found


def _lengths(labeled: LabeledPick) -> tuple[int, int, int]:
    a, b = map(text_length, labeled.pick.responses)
    return text_length(labeled.pick.prompt), (a + b) // 2, abs(a - b)


def _spread(values: Sequence[int]) -> str:
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"

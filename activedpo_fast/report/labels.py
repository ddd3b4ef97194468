"""What the labels of a run say: their counts, length bias, agreement and pace."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from activedpo_fast.pool.texts import Text
from activedpo_fast.report.reading import LabeledPick

_Z = 1.959964  # two-sided 95%


@dataclass(frozen=True)
class Share:
    """`hits` of `total`, with Wilson's 95% interval (J. Am. Stat. Assoc. 22, 1927)."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        n, z2 = self.total, _Z**2
        center = (self.hits + z2 / 2) / (n + z2)
        half = _Z * math.sqrt(self.hits * (n - self.hits) / n + z2 / 4) / (n + z2)
        return max(0.0, center - half), min(1.0, center + half)

    def __str__(self) -> str:
        if not self.total:
            return "none"
        low, high = self.interval
        return (
            f"{self.value:.0%} ({self.hits} of {self.total}; 95% interval {low:.0%} to {high:.0%})"
        )


def label_counts(picks: Iterable[LabeledPick]) -> dict[str, int]:
    """Return how many labels are 0, 1, "tie" and "skip", and how many are "missing"."""
    found = Counter("missing" if pick.label is None else str(pick.label) for pick in picks)
    return {name: found[name] for name in ("0", "1", "tie", "skip", "missing")}


def longer_preferred(picks: Iterable[LabeledPick]) -> Share:
    """Return how often the longer response (in characters) was preferred, where lengths differ."""
    hits = total = 0
    for pick in picks:
        a, b = map(text_length, pick.pick.responses)
        if pick.label in (0, 1) and a != b:
            total += 1
            hits += pick.label == int(b > a)
    return Share(hits, total)


def agreement(picks: Iterable[LabeledPick]) -> Share:
    """Return how often two labelers gave the same answer to a pair: all twos of all pairs."""
    hits = total = 0
    for pick in picks:
        said = {answer.labeler: answer.label for answer in pick.answers if answer.labeler}
        for a, b in combinations(said.values(), 2):
            total += 1
            hits += a == b
    return Share(hits, total)


def pace(picks: Iterable[LabeledPick]) -> dict[str, tuple[int, float | None]]:
    """Return for each labeler the number of answers, and their median seconds where recorded."""
    seconds: dict[str, list[float]] = {}
    answers: Counter[str] = Counter()
    for pick in picks:
        for answer in pick.answers:
            if answer.labeler:
                answers[answer.labeler] += 1
                seconds.setdefault(answer.labeler, [])
                if answer.seconds is not None:
                    seconds[answer.labeler].append(answer.seconds)
    return {name: (n, _median(seconds[name])) for name, n in sorted(answers.items())}


def text_length(text: Text) -> int:
    """Return the number of characters of a text, or of the contents of chat messages."""
    if isinstance(text, str):
        return len(text)
    return sum(len(message["content"]) for message in text)


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None

"""A share of answers, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

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

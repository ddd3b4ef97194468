"""Pairs drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.eligible import Eligible, random_order
from activedpo_fast.selection.greedy.top import rank_top
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies.base import Part, Strategy


@dataclass(frozen=True)
class Random(Strategy):
    """Pairs drawn uniformly without replacement. Every score is 0.0: there is no criterion.

    Option: `seed`. The same seed and number of candidates give the same pairs, so a loop uses a new
    seed each round. A smaller n gives the first n of the same draws. With rules, forbidden pairs
    are skipped; costs have no effect, and a `min_score` above 0 is an error.
    """

    name: ClassVar[str] = "random"
    requires: ClassVar[frozenset[str]] = frozenset()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ActiveDPOError(f"seed must be an integer, not {self.seed!r}")

    def select(
        self,
        signals: Signals,
        n: int,
        *,
        eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None,
        show_progress: bool | None = None,
    ) -> Ranking:
        part = Part.of(signals, n, group)
        eligible = eligible or Eligible.everything(len(signals.pairs))
        if eligible.min_score > 0:
            raise ActiveDPOError(
                "min_score: the strategy 'random' has no scores to compare with "
                f"{eligible.min_score}"
            )
        eligible.n_random = part.n
        order = random_order(part.total, self.seed)
        eligible.random_order = order[part.offset : part.offset + len(signals.pairs)]
        zeros = torch.zeros(len(signals.pairs), dtype=torch.float64)
        return rank_top(zeros, zeros, part.n, eligible, group)

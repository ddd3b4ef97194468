"""Pairs whose responses a reward model rates furthest apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.distributed as dist

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.rewards import Reward
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.top import rank_top
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies.base import Part, Strategy
from activedpo_fast.selection.strategies.reward_margins import few_ulps


@dataclass(frozen=True)
class RewardGap(Strategy):
    """The n pairs with the largest |r(x, y_a) - r(x, y_b)|, r a reward from outside the policy.

    A rough r will do: it decides which pairs are labeled, not what their labels are. With r that
    has learned from the labels so far this is DeltaQwen's and DeltaUCB's aim without its bonus for
    uncertainty (ActiveUltraFeedback, arXiv 2603.09692). docs/evidence.md has what it is worth.

    Option: `reward`, a function of prompts and responses (`activedpo_fast.labels.Reward`; a
    `RewardModel` is one), or the name of the pool's column with a list of numbers, one for each
    response of the item. The score is the gap, in units of r.
    """

    name: ClassVar[str] = "reward_gap"
    requires: ClassVar[frozenset[str]] = frozenset({"rewards"})
    reward: str | Reward = "rewards"

    def __post_init__(self) -> None:
        if not (callable(self.reward) or (isinstance(self.reward, str) and self.reward)):
            raise ActiveDPOError(
                f"reward must be the name of a column or a function, not {self.reward!r}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> RewardGap:
        return self  # nothing in it changes, and the reward may be a large model

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
        rewards = part.everywhere(lambda: signals.rewards(self.reward))
        first, second = rewards[signals.pairs].unbind(1)
        error_bound = few_ulps(first.abs() + second.abs())
        return rank_top((first - second).abs(), error_bound, n, eligible, group)

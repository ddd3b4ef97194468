"""Pairs whose preference the implicit reward is most, or least, certain of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist

from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.top import rank_top
from activedpo_fast.selection.information.matrix import check_positive
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies.base import Part, Strategy
from activedpo_fast.selection.strategies.reward_margins import few_ulps, margins, warn_if_alike


@dataclass(frozen=True)
class _Margin(Strategy):
    """Base of strategies that rank pairs by d = beta * the difference of log pi - log pi_ref."""

    requires: ClassVar[frozenset[str]] = frozenset({"logps", "ref_logps"})
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)


@dataclass(frozen=True)
class MarginLarge(_Margin):
    """The n pairs with the largest |d|, whose preference the implicit reward is most certain of.

    d = beta * ((log pi - log pi_ref)(y_a) - (log pi - log pi_ref)(y_b)): the second step of `Aplp`
    alone. Option: `beta`, the temperature of DPO. The score is |d|.
    """

    name: ClassVar[str] = "margin_large"

    def select(
        self,
        signals: Signals,
        n: int,
        *,
        eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None,
        show_progress: bool | None = None,
    ) -> Ranking:
        margin, error_bound = margins(signals, self.beta, Part.of(signals, n, group))
        warn_if_alike(margin, error_bound)
        return rank_top(margin.abs(), error_bound, n, eligible, group)


@dataclass(frozen=True)
class MarginSmall(_Margin):
    """The n pairs with the smallest |d|, whose preference the implicit reward is least certain of.

    d = beta * ((log pi - log pi_ref)(y_a) - (log pi - log pi_ref)(y_b)), so that sigmoid(d) is the
    model's probability that y_a is preferred. Option: `beta`, the temperature of DPO. The score is
    sigmoid(-|d|), the probability of the less likely preference, at most 1/2. For |d| above 700 it
    is 0 in float64; such pairs come in order of index.
    """

    name: ClassVar[str] = "margin_small"

    def select(
        self,
        signals: Signals,
        n: int,
        *,
        eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None,
        show_progress: bool | None = None,
    ) -> Ranking:
        margin, error_bound = margins(signals, self.beta, Part.of(signals, n, group))
        warn_if_alike(margin, error_bound)
        # A positive score, not -|d|, so that dividing it by a larger cost lowers it.
        scores = torch.sigmoid(-margin.abs())
        error_bound = scores * (1 - scores) * error_bound + few_ulps(scores)
        return rank_top(scores, error_bound, n, eligible, group)

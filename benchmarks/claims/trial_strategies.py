"""Criteria that are on trial: small, in float64, all candidates in memory, one process, no rules.

One that the data speaks for moves into the library, with bounds on its rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies import Strategy

_SAME = 1e-10  # relative difference of scores below which the lower index goes first


@dataclass(frozen=True)
class Trial(Strategy):
    """Greedy by a score that changes with each pick."""

    requires: ClassVar[frozenset[str]] = frozenset({"gradients"})
    lam: float = 1.0

    def select(
        self,
        signals: Signals,
        n: int,
        *,
        eligible: Any = None,
        group: Any = None,
        show_progress: bool | None = None,
    ) -> Ranking:
        if eligible is not None or group is not None:
            raise NotImplementedError("a trial has no rules and one process")
        left = torch.ones(len(signals.pairs), dtype=torch.bool)
        picks: list[int] = []
        scores: list[float] = []
        step = self.steps(signals, picks)
        for _ in range(n):
            score = torch.where(left, next(step), -torch.inf)
            best = float(score.max())
            picks.append(int((score >= best - _SAME * abs(best)).nonzero()[0]))
            scores.append(best)
            left[picks[-1]] = False
        return Ranking(torch.tensor(picks), torch.tensor(scores, dtype=torch.float64))

    @abstractmethod
    def steps(self, signals: Signals, picks: list[int]) -> Iterator[Tensor]:
        """Scores float64 [N] for each pick; `picks` has those made by then."""


@dataclass(frozen=True)
class Diagonal(Trial):
    """The largest sum of phi^2 / diag(V): V without its correlations."""

    name: ClassVar[str] = "diagonal"

    def steps(self, signals: Signals, picks: list[int]) -> Iterator[Tensor]:
        squares = _differences(_rows(signals.gradients()), signals.pairs).square()
        past_rows, past_pairs = signals.history_gradients()
        seen = _differences(_rows(past_rows), past_pairs).square().sum(0) + self.lam
        while True:
            yield squares @ seen.reciprocal()
            seen = seen + squares[picks[-1]]


@dataclass(frozen=True)
class AtOnce(Trial):
    """The largest phi^T V^-1 phi, with V of the labeled pairs: no pick knows of the others."""

    name: ClassVar[str] = "at_once"

    def steps(self, signals: Signals, picks: list[int]) -> Iterator[Tensor]:
        phi = _differences(_rows(signals.gradients()), signals.pairs)
        past_rows, past_pairs = signals.history_gradients()
        past = _differences(_rows(past_rows), past_pairs)
        v = past.T @ past + self.lam * torch.eye(phi.shape[1], dtype=torch.float64)
        scores = (phi * torch.linalg.solve(v, phi.T).T).sum(dim=1)
        while True:
            yield scores


TRIALS: dict[str, type[Trial]] = {t.name: t for t in (Diagonal, AtOnce)}


def _rows(rows: Any) -> Tensor:
    return torch.as_tensor(rows).to(torch.float64)


def _differences(rows: Tensor, pairs: Tensor) -> Tensor:
    return rows[pairs[:, 0]] - rows[pairs[:, 1]]

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

from activedpo_fast.selection.information import InformationMatrix
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies import Strategy

_SAME = 1e-10  # relative difference of scores below which the lower index goes first


@dataclass(frozen=True)
class Trial(Strategy):
    """Greedy by a score that changes with each pick."""

    requires: ClassVar[frozenset[str]] = frozenset({"gradients"})
    lam: float = 1.0

    def select(self, signals: Signals, n: int, *, eligible: Any = None, group: Any = None,
               show_progress: bool | None = None) -> Ranking:
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
class Trace(Trial):
    """Each time the pair that lowers tr(I V^-1) most (V-optimal design; arXiv 2606.19607).

    I is the covariance of g over the policy's own responses to each prompt: the sum over the rows
    of (g - mean of its prompt) (.)^T, as these rows are what the policy sampled. With u = V^-1 phi
    a pair lowers the trace by u^T I u / (1 + phi^T u).
    """

    name: ClassVar[str] = "trace"

    def steps(self, signals: Signals, picks: list[int]) -> Iterator[Tensor]:
        rows = _rows(signals.gradients())
        past_rows, past_pairs = signals.history_gradients()
        weights, past_weights = self.weights(signals)
        phi = _differences(rows, signals.pairs) * weights
        information = InformationMatrix(rows.shape[1], lam=self.lam)
        information.add_many(_differences(_rows(past_rows), past_pairs) * past_weights)
        own = torch.nn.functional.one_hot(signals.item_of_row).to(rows.dtype)
        target = rows - own @ (own.T @ rows) / own.sum(0)[signals.item_of_row].unsqueeze(1)
        solved = information.solve(phi)
        seen = solved @ target.T
        while True:
            lowered = 1 + (solved * phi).sum(1)
            yield seen.square().sum(1) / lowered
            pick = picks[-1]
            direction, reach = solved[pick].clone(), seen[pick].clone()
            share = (phi @ direction) / lowered[pick]
            solved -= torch.outer(share, direction)
            seen -= torch.outer(share, reach)

    def weights(self, signals: Signals) -> tuple[Tensor | float, Tensor | float]:
        """What candidates' and labeled pairs' phi are multiplied by."""
        return 1.0, 1.0


@dataclass(frozen=True)
class TracePlus(Trace):
    """`Trace` with every phi times sqrt(mu (1 - mu)), as in `AdpoPlus`: what a label can tell."""

    name: ClassVar[str] = "trace_plus"
    requires: ClassVar[frozenset[str]] = frozenset({"gradients", "logps", "ref_logps"})
    beta: float = 0.1

    def weights(self, signals: Signals) -> tuple[Tensor, Tensor]:
        reward = signals.logps() - signals.ref_logps()
        past, pairs = signals.history_logps()
        past_ref, ref_pairs = signals.history_ref_logps()
        return (_uncertainty(self.beta * _difference(reward, signals.pairs)),
                _uncertainty(self.beta * (_difference(past, pairs)
                                          - _difference(past_ref, ref_pairs))))


@dataclass(frozen=True)
class Diagonal(Trial):
    """The largest sum of phi^2 / diag(V): what is left of V without its correlations."""

    name: ClassVar[str] = "diagonal"

    def steps(self, signals: Signals, picks: list[int]) -> Iterator[Tensor]:
        squares = _differences(_rows(signals.gradients()), signals.pairs).square()
        past_rows, past_pairs = signals.history_gradients()
        seen = _differences(_rows(past_rows), past_pairs).square().sum(0) + self.lam
        while True:
            yield squares @ seen.reciprocal()
            seen = seen + squares[picks[-1]]


TRIALS: dict[str, type[Trial]] = {t.name: t for t in (Trace, TracePlus, Diagonal)}


def _rows(rows: Any) -> Tensor:
    return torch.as_tensor(rows).to(torch.float64)


def _differences(rows: Tensor, pairs: Tensor) -> Tensor:
    return rows[pairs[:, 0]] - rows[pairs[:, 1]]


def _difference(values: Tensor, pairs: Tensor) -> Tensor:
    return values[pairs[:, 0]] - values[pairs[:, 1]]


def _uncertainty(d: Tensor) -> Tensor:
    """sqrt(mu (1 - mu)), mu = sigmoid(d), as a column."""
    mu = torch.sigmoid(d)
    return (mu * (1 - mu)).sqrt().unsqueeze(1)

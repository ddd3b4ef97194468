"""Criteria that are on trial: small, in float64, all candidates in memory.

One that the data speaks for moves into the library, with its bounds on rounding, rules and several
processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from activedpo_fast.selection.information import InformationMatrix
from activedpo_fast.selection.normalize import PairFeatures
from activedpo_fast.selection.signals import TensorSignals


def trace(signals: TensorSignals, n: int, *, lam: float = 1.0, weighted: bool = False,
          beta: float = 1.0) -> Tensor:
    """Greedy, each time the pair that lowers tr(I V^-1) most (V-optimal design, as 2606.19607).

    I is the covariance of g over the policy's own responses to each prompt: the sum over the rows
    of (g - mean of its prompt) (.)^T, those that the policy itself sampled. With u = V^-1 phi a
    pair lowers the trace by u^T I u / (1 + phi^T u). `weighted` has every phi, candidates' and
    labeled ones', multiplied by sqrt(mu (1 - mu)), as `adpo_plus` has.

    Returns:
        int64 [n], the picks' places in `signals.pairs`.
    """
    rows = signals.gradients()
    assert isinstance(rows, Tensor)
    phi = rows[signals.pairs[:, 0]] - rows[signals.pairs[:, 1]]
    past_rows, past_pairs = signals.history_gradients()
    past = PairFeatures(past_rows, past_pairs, None).at(torch.arange(len(past_pairs)))
    if weighted:
        reward = beta * (signals.logps() - signals.ref_logps())
        past_logps, where = signals.history_logps()
        past_reward = beta * (past_logps - signals.history_ref_logps()[0])
        phi = phi * _uncertainty(reward[signals.pairs]).unsqueeze(1)
        past = past * _uncertainty(past_reward[where]).unsqueeze(1)
    information = InformationMatrix(rows.shape[1], lam=lam)
    information.add_many(past)
    own = torch.nn.functional.one_hot(signals.item_of_row).to(rows.dtype)
    target = rows - own @ (own.T @ rows) / own.sum(0)[signals.item_of_row].unsqueeze(1)
    solved = information.solve(phi)
    left = torch.ones(len(phi), dtype=torch.bool)
    picks = []
    for _ in range(n):
        lowered = (solved @ target.T).square().sum(1) / (1 + (solved * phi).sum(1))
        pick = int(torch.where(left, lowered, -torch.inf).argmax())
        picks.append(pick)
        left[pick] = False
        direction = solved[pick].clone()
        solved -= torch.outer(phi @ direction, direction) / (1 + phi[pick] @ direction)
    return torch.tensor(picks)


def diagonal(signals: TensorSignals, n: int, *, lam: float = 1.0) -> Tensor:
    """Greedy sum of phi^2 / diag(V): what is left of V without its correlations.

    Returns:
        int64 [n], the picks' places in `signals.pairs`.
    """
    rows = signals.gradients()
    assert isinstance(rows, Tensor)
    squares = (rows[signals.pairs[:, 0]] - rows[signals.pairs[:, 1]]).square()
    past_rows, past_pairs = signals.history_gradients()
    seen = (past_rows[past_pairs[:, 0]] - past_rows[past_pairs[:, 1]]).square().sum(0) + lam
    left = torch.ones(len(squares), dtype=torch.bool)
    picks = []
    for _ in range(n):
        pick = int(torch.where(left, squares @ seen.reciprocal(), -torch.inf).argmax())
        picks.append(pick)
        left[pick] = False
        seen = seen + squares[pick]
    return torch.tensor(picks)


TRIALS = {"trace": trace, "diagonal": diagonal}


def _uncertainty(rewards: Tensor) -> Tensor:
    """sqrt(mu (1 - mu)) of pairs, from the two implicit rewards [N, 2]."""
    mu = torch.sigmoid(rewards[:, 0] - rewards[:, 1])
    return (mu * (1 - mu)).sqrt()

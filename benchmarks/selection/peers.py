"""The alternatives for selecting pairs, one function each, and the float64 definition.

All take the same: gradient rows of responses, pairs of row numbers, and return the picks in order.
Forming and normalizing the features is part of each, in float32 as published code runs. kappa is 1
throughout, so that V begins as lam I.

Not included, and why: DPPy (0.3.3) samples DPPs and has no MAP inference, so Chen et al.'s
greedy MAP is written out below; apricot (0.6.1) has no log det, and its CustomSelection refuses
features of both signs.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata

import torch
from torch import Tensor

from activedpo_fast.selection import greedy_logdet
from activedpo_fast.selection.pair_features import Normalize, PairFeatures
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import History


@dataclass(frozen=True)
class Problem:
    """rows float32 [R, k], pairs int64 [N, 2]; history: labeled pairs and their rows."""

    rows: Tensor
    pairs: Tensor
    normalize: Normalize
    lam: float = 1.0
    history: History | None = None

    def features(self) -> Tensor:
        """phi of all pairs, float32 [N, k]."""
        return _features(self.rows, self.pairs, self.normalize)

    def first_scores(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """V^-1 [k, k] and the scores [N] before the first pick, in phi's dtype."""
        k = phi.shape[1]
        if self.history is None:
            return torch.eye(k, dtype=phi.dtype) / self.lam, phi.square().sum(1) / self.lam
        labeled = _features(*self.history, self.normalize)
        v = torch.addmm(self.lam * torch.eye(k, dtype=phi.dtype), labeled.T, labeled)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(v))
        return inverse, _quadratic(phi, inverse)


def ours(problem: Problem, n: int) -> Tensor:
    return rank(problem, n).indices


def rank(problem: Problem, n: int) -> Ranking:
    """The library's `Ranking` of n picks."""
    return greedy_logdet(
        problem.rows,
        problem.pairs,
        n,
        lam=problem.lam,
        normalize=problem.normalize,
        history=problem.history,
        show_progress=False,
    )


def sherman_morrison(problem: Problem, n: int, *, in_place: bool = True) -> Tensor:
    """V^-1 explicit and updated by an outer product, scores lowered by (phi . w)^2.

    Not `in_place`: V^-1 is a new matrix at every pick, as V_inv = V_inv - outer(w, w) makes it.
    """
    phi = problem.features()
    inverse, scores = problem.first_scores(phi)
    picks = []
    for _ in range(n):
        pick = int(scores.argmax())
        picks.append(pick)
        w = inverse @ phi[pick]
        w /= (1 + phi[pick] @ w).sqrt()
        if in_place:
            inverse.addr_(w, w, alpha=-1)
        else:
            inverse = inverse - torch.outer(w, w)
        scores -= (phi @ w).square_()
        scores[pick] = -torch.inf
    return torch.tensor(picks)


def rescore(problem: Problem, n: int) -> Tensor:
    """V^-1 by Sherman-Morrison, and phi^T V^-1 phi of every candidate again at every pick."""
    phi = problem.features()
    inverse, _ = problem.first_scores(phi)
    left = torch.zeros(len(phi))
    picks = []
    for _ in range(n):
        pick = int((_quadratic(phi, inverse) + left).argmax())
        picks.append(pick)
        left[pick] = -torch.inf
        w = inverse @ phi[pick]
        w /= (1 + phi[pick] @ w).sqrt()
        inverse.addr_(w, w, alpha=-1)
    return torch.tensor(picks)


def greedy_map(problem: Problem, n: int) -> Tensor:
    """Fast greedy MAP inference with the kernel I + phi phi^T / lam, [N, N], formed at first.

    Source: Chen, Zhang, Zhou, "Fast greedy MAP inference for determinantal point process to improve
    recommendation diversity" (NeurIPS 2018), algorithm 1: incremental Cholesky factors.
    """
    phi = problem.features()
    kernel = (phi @ phi.T).div_(problem.lam)
    kernel.diagonal().add_(1)
    return _greedy_map(kernel.diagonal().clone(), lambda pick: kernel[pick], n)


def greedy_map_rows(problem: Problem, n: int) -> Tensor:
    """The same without a kernel in memory: the row of a pick is formed when it is picked."""
    phi = problem.features()
    return _greedy_map(
        1 + phi.square().sum(1) / problem.lam, lambda pick: phi @ (phi[pick] / problem.lam), n
    )


def _greedy_map(diagonal: Tensor, row: Callable[[int], Tensor], n: int) -> Tensor:
    """The row of the kernel needs no 1 on the diagonal: a pick's own entry is not used again."""
    factors = torch.empty(n, len(diagonal))
    picks: list[int] = []
    for t in range(n):
        pick = int(diagonal.argmax())
        picks.append(pick)
        known = factors[:t]
        factors[t] = (row(pick) - known[:, pick] @ known) / diagonal[pick].sqrt()
        diagonal = diagonal - factors[t].square()
        diagonal[pick] = -torch.inf
    return torch.tensor(picks)


def submodlib(problem: Problem, n: int) -> Tensor:
    """submodlib's LogDeterminantFunction (C++, after Chen et al.), maximized lazily."""
    from submodlib.functions.logDeterminant import LogDeterminantFunction

    phi = problem.features()
    kernel = (phi @ phi.T).div_(problem.lam).numpy()
    function = LogDeterminantFunction(n=len(phi), mode="dense", lambdaVal=1.0, sijs=kernel)
    with redirect_stdout(io.StringIO()):
        taken = function.maximize(
            budget=n,
            optimizer="LazyGreedy",
            stopIfZeroGain=False,
            stopIfNegativeGain=False,
            show_progress=False,
        )
    return torch.tensor([pick for pick, _ in taken])


@dataclass(frozen=True)
class Contender:
    """A way to select pairs.

    name: as printed. select(problem, n): the picks, int64 [n].
    few: picks to measure and to extrapolate from, where a whole selection takes too long.
    most_pairs: the largest N at which it is measured (its kernel is N x N numbers).
    takes_history: whether it can start from labeled pairs.
    """

    name: str
    select: Callable[[Problem, int], Tensor]
    few: int | None = None
    most_pairs: int | None = None
    takes_history: bool = True


OURS = Contender("**ours**", ours)
SHERMAN_MORRISON = Contender("Sherman–Morrison loop", sherman_morrison)


@cache
def contenders() -> tuple[Contender, ...]:
    """All contenders that are installed, ours and the Sherman–Morrison loop first."""
    found = (
        OURS,
        SHERMAN_MORRISON,
        Contender("the same, V⁻¹ not in place", partial(sherman_morrison, in_place=False)),
        Contender("re-scoring with V⁻¹", rescore, few=3),
        Contender("greedy MAP, kernel formed", greedy_map, most_pairs=20_000, takes_history=False),
        Contender("greedy MAP, kernel rows as needed", greedy_map_rows, takes_history=False),
    )
    if importlib.util.find_spec("submodlib") is None:
        print("submodlib is not here: `make selection` installs it")
        return found
    version = metadata.version("submodlib-py")
    return (
        *found,
        Contender(f"submodlib {version}", submodlib, most_pairs=10_000, takes_history=False),
    )


def brute_force(problem: Problem, n: int) -> Tensor:
    """The definition: in float64, every score from V itself at every pick; ties go to the lowest
    index."""
    phi = _features(problem.rows.double(), problem.pairs, problem.normalize)
    v = problem.lam * torch.eye(phi.shape[1], dtype=torch.float64)
    if problem.history is not None:
        labeled = _features(problem.history[0].double(), problem.history[1], problem.normalize)
        v += labeled.T @ labeled
    left = torch.zeros(len(phi), dtype=torch.float64)
    picks = []
    for _ in range(n):
        scores = (phi * torch.linalg.solve(v, phi.T).T).sum(1) + left
        pick = int((scores >= scores.max() * (1 - 1e-12)).nonzero()[0])
        picks.append(pick)
        left[pick] = -torch.inf
        v += torch.outer(phi[pick], phi[pick])
    return torch.tensor(picks)


def check(problem: Problem, n: int) -> None:
    """Assert that every contender takes the pairs that the definition does, on a small problem.

    They run with the problem's history, if they can, and without it. With "pair", all first scores
    tie and float32 rounding decides, so only ours runs.
    """
    for normalize in ("response", "pair", None):
        for history in (None, problem.history):
            asked = replace(problem, normalize=normalize, history=history)
            wanted = brute_force(asked, n)
            for contender in contenders():
                if normalize == "pair" and contender is not OURS:
                    continue
                if history is not None and not contender.takes_history:
                    continue
                given = contender.select(asked, n)
                assert given.equal(wanted), (
                    f"{contender.name}, {normalize}, {'a' if history else 'no'} history: "
                    f"{given.tolist()} instead of {wanted.tolist()}"
                )


def logdet(problem: Problem, picks: Tensor) -> float:
    """log det(I + phi phi^T / lam) of the picks, float64; without the history."""
    features = PairFeatures(problem.rows, problem.pairs[picks], problem.normalize)
    phi = features.at(torch.arange(len(picks)))
    gram = torch.eye(len(picks), dtype=torch.float64) + phi @ phi.T / problem.lam
    return float(torch.linalg.slogdet(gram).logabsdet)


def _features(rows: Tensor, pairs: Tensor, normalize: Normalize) -> Tensor:
    if normalize == "response":
        rows = torch.nn.functional.normalize(rows, dim=1)
    phi = rows[pairs[:, 0]] - rows[pairs[:, 1]]
    return torch.nn.functional.normalize(phi, dim=1) if normalize == "pair" else phi


def _quadratic(phi: Tensor, matrix: Tensor) -> Tensor:
    """phi^T matrix phi of every row."""
    return ((phi @ matrix) * phi).sum(1)

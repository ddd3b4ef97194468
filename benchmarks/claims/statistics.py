"""Paired statistics of learning curves: area, labels saved, tests corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Curves = NDArray[np.float64]  # [seeds, rounds + 1], the start first
Axis = NDArray[np.float64]  # [rounds + 1]

_RESAMPLES = 10_000
_LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over seeds with its bootstrap interval (percentiles, 95 %)."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """A method beside the baseline, on the same seeds.

    area: mean over the rounds of the difference of their curves.
    p: two-sided, of the sign-flip test of `area`; p_holm: with Holm's correction.
    saved: share of the baseline's labels that the method does without, for the reward that the
        baseline ends with; negative where it needs more. NaN where it does not get there.
    cheaper: the same share of the baseline's cost, where costs are known.
    """

    area: Estimate
    p: float
    p_holm: float
    saved: Estimate
    cheaper: Estimate | None


def compare(
    curves: Mapping[str, Curves],
    baseline: str,
    labels: Axis,
    costs: Mapping[str, Axis] | None = None,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Every method but the baseline; all curves have the same seeds in the same order.

    Args:
        labels: [rounds + 1], how many there are at each point; the first is 0.
        costs: the same for what each method costs.
    """
    generator = np.random.default_rng(seed)
    base = curves[baseline]
    draws = generator.integers(len(base), size=(_RESAMPLES, len(base)))
    signs = generator.choice((-1.0, 1.0), size=(_RESAMPLES, len(base)))
    areas = {
        name: (curve - base)[:, 1:].mean(axis=1)
        for name, curve in curves.items()
        if name != baseline
    }
    p = {name: _sign_flip(area, signs) for name, area in areas.items()}
    corrected = holm(p)
    return {
        name: Comparison(
            _bootstrap(area, draws),
            p[name],
            corrected[name],
            saved(curves[name], base, labels, labels, draws),
            None
            if costs is None
            else saved(curves[name], base, costs[name], costs[baseline], draws),
        )
        for name, area in areas.items()
    }


def saved(method: Curves, base: Curves, own: Axis, its: Axis, draws: NDArray[np.int64]) -> Estimate:
    """1 - (where the mean curve reaches the baseline's end) / (where the baseline reaches it).

    Both are read off the mean curves, made monotone and interpolated; the interval is of the same
    on resampled seeds. A curve that does not get there counts as needing more than all: the value
    is then NaN, and such resamples count as -inf for the lower end.

    Args:
        own, its: [rounds + 1], the labels or the cost of the method and of the baseline.
    """
    value = _saved(method.mean(axis=0), base.mean(axis=0), own, its)
    means = zip(_resampled(method, draws), _resampled(base, draws), strict=True)
    found = np.array([_saved(a, b, own, its) for a, b in means])
    found = np.sort(np.where(np.isnan(found), -np.inf, found))
    low, high = (found[int(q * (len(found) - 1))] for q in ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return Estimate(value, float(low), float(high))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction (Scand. J. Statist. 6, 1979)."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return corrected


def mean_and_error(values: Curves) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Over seeds: the mean and its standard error."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))


def _resampled(curves: Curves, draws: NDArray[np.int64]) -> Curves:
    """Mean curve of each draw of seeds, [resamples, rounds + 1]."""
    counts = np.stack([np.bincount(draw, minlength=len(curves)) for draw in draws])
    resampled: Curves = counts @ curves / len(curves)
    return resampled


def _saved(method: NDArray[np.float64], base: NDArray[np.float64], own: Axis, its: Axis) -> float:
    aim = np.maximum.accumulate(base)[-1]
    needed = _first_at(aim, np.maximum.accumulate(method), own)
    usual = _first_at(aim, np.maximum.accumulate(base), its)
    return 1 - needed / usual if usual > 0 else float("nan")  # the baseline has learned nothing


def _first_at(aim: float, curve: NDArray[np.float64], labels: Axis) -> float:
    if curve[-1] < aim:
        return float("nan")
    n = int(np.argmax(curve >= aim))
    if n == 0:
        return float(labels[0])
    share = (aim - curve[n - 1]) / (curve[n] - curve[n - 1])
    return float(labels[n - 1] + share * (labels[n] - labels[n - 1]))


def _bootstrap(values: NDArray[np.float64], draws: NDArray[np.int64]) -> Estimate:
    means = values[draws].mean(axis=1)
    low, high = np.quantile(means, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return Estimate(float(values.mean()), float(low), float(high))


def _sign_flip(differences: NDArray[np.float64], signs: NDArray[np.float64]) -> float:
    """Share of sign patterns under which the mean is at least as far from 0 (Fisher's test)."""
    observed = abs(differences.mean())
    flipped = np.abs((signs * differences).mean(axis=1))
    return float((1 + (flipped >= observed - 1e-15).sum()) / (1 + len(signs)))

"""Differences of the implicit reward, for strategies that need pi_ref."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies.base import Part

logger = logging.getLogger(__name__)


def margins(signals: Signals, beta: float, part: Part) -> tuple[Tensor, Tensor]:
    """Return d of every candidate pair and a bound on its rounding error, both float64 [N]."""
    logps, ref_logps = signals.logps(), signals.ref_logps()

    def compute() -> tuple[Tensor, Tensor]:
        check_finite(logps, "logps")
        check_finite(ref_logps, "ref_logps")
        first, second = signals.pairs.unbind(1)
        reward = beta * (logps - ref_logps)
        size = beta * (logps.abs() + ref_logps.abs())
        return reward[first] - reward[second], few_ulps(size[first] + size[second])

    return part.everywhere(compute)


def warn_if_alike(margins: Tensor, error_bound: Tensor) -> None:
    """Log a warning if the policy equals its reference, as before any training."""
    if len(margins) and bool((margins.abs() <= error_bound).all()):
        logger.warning(
            "every reward difference is 0, as before any training: it does not rank the pairs, so "
            "the first ones in the pool are picked"
        )


def history_margins(signals: Signals, beta: float) -> Tensor:
    """Return d of every labeled pair, float64 [t]."""
    parts = []
    for name, history in (
        ("history_logps", signals.history_logps()),
        ("history_ref_logps", signals.history_ref_logps()),
    ):
        numbers, pairs = history
        first, second = pairs.unbind(1)
        parts.append(check_finite(numbers, name)[first] - numbers[second])
    logps, ref_logps = parts
    if len(logps) != len(ref_logps):
        raise ActiveDPOError(
            f"history_logps has {len(logps)} labeled pairs, history_ref_logps has {len(ref_logps)}"
        )
    return beta * (logps - ref_logps)


def uncertainty(d: Tensor) -> Tensor:
    """Return sqrt(mu (1 - mu)) for mu = sigmoid(d): positive, and accurate for any |d|."""
    half = torch.exp(-d.abs() / 2)  # mu (1 - mu) = e^-|d| / (1 + e^-|d|)^2
    return (half / (1 + half.square())).clamp_min(torch.finfo(torch.float64).tiny)


def check_finite(values: Tensor, name: str) -> Tensor:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ActiveDPOError(f"{name} of response row {bad[0]} is not finite")
    return values


def few_ulps(values: Tensor) -> Tensor:
    return 8 * torch.finfo(torch.float64).eps * values.abs()

"""Strategies: ways to choose n candidate pairs. They share one interface, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.strategies.activedpo import ActiveDPO
from activedpo_fast.selection.strategies.adpo_plus import AdpoPlus
from activedpo_fast.selection.strategies.aplp import Aplp
from activedpo_fast.selection.strategies.apo import Apo
from activedpo_fast.selection.strategies.base import Strategy
from activedpo_fast.selection.strategies.margin import MarginLarge, MarginSmall
from activedpo_fast.selection.strategies.random import Random
from activedpo_fast.selection.strategies.reward_gap import RewardGap
from activedpo_fast.selection.strategies.trace import Trace, TracePlus

__all__ = [
    "STRATEGIES",
    "ActiveDPO",
    "AdpoPlus",
    "Apo",
    "Aplp",
    "MarginLarge",
    "MarginSmall",
    "Random",
    "RewardGap",
    "Strategy",
    "Trace",
    "TracePlus",
    "make_strategy",
]

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        ActiveDPO,
        Random,
        Apo,
        Aplp,
        MarginSmall,
        MarginLarge,
        AdpoPlus,
        Trace,
        TracePlus,
        RewardGap,
    )
}


def make_strategy(
    name: str, *, offered: Mapping[str, Any] | None = None, **options: Any
) -> Strategy:
    """Return the strategy called `name`, one of `STRATEGIES`, with its options.

    Args:
        offered: values by option name; names that are not options of the strategy are ignored.

    Raises:
        ActiveDPOError: an unknown name or option, listing the known ones; a bad value.

    Examples:
        >>> from activedpo_fast import ActiveDPOSelector, make_strategy
        >>> strategy = make_strategy("activedpo", normalize="pair", lam=0.1)
        >>> selector = ActiveDPOSelector(model, processing_class=tokenizer, strategy=strategy)
        >>> selector.select(pool, 2).strategy
        'activedpo'
        >>> sorted(make_strategy("margin_small").requires)
        ['logps', 'ref_logps']
    """
    if name not in STRATEGIES:
        raise ActiveDPOError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    known = STRATEGIES[name].options()
    for option in options:
        if option not in known:
            raise ActiveDPOError(
                f"strategy {name!r} has no option {option!r}; known: {', '.join(known)}"
            )
    fitting = {option: value for option, value in (offered or {}).items() if option in known}
    return STRATEGIES[name](**{**fitting, **options})

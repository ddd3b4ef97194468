"""Two stages: cheap rows of all candidates choose some, exact rows of these alone decide.

The first stage has the strategy and the history of the second. Its rules leave more room: a prompt
or a group may fill `per_pick` times as much of it, so that the second stage has a choice within
every limit. `min_score` is for exact scores and waits for the second stage. Random picks need no
rows: they are those that one stage would draw, and both stages begin with them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.top import rank_top
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies import STRATEGIES, Strategy
from activedpo_fast.selection.strategies.base import Part


def select_in_two_stages(
    strategy: Strategy,
    per_pick: int,
    signals: Signals,
    n: int,
    *,
    eligible: Eligible | None = None,
    group: dist.ProcessGroup | None = None,
    show_progress: bool | None = None,
) -> Ranking:
    """Return n candidate pairs out of per_pick * n that the strategy takes from cheap gradients.

    If that is all candidates, it is `strategy.select`, and no cheap gradients are used.

    Args:
        per_pick: from 1.
        signals: exact ones, with `cheap` and `only`.
        n, eligible, group, show_progress: see `Strategy.select`.

    Raises:
        ActiveDPOError: see `Strategy.select`.
    """
    part = Part.of(signals, n, group)
    if not 0 < per_pick * part.n < part.total:
        return strategy.select(
            signals, n, eligible=eligible, group=group, show_progress=show_progress
        )
    first = strategy.select(
        signals.cheap(),
        per_pick * part.n,
        eligible=None if eligible is None else _first_rules(eligible, per_pick, part, group),
        group=group,
        show_progress=show_progress,
    )
    kept = first.indices.sort().values
    mine = kept[_in_part(kept, part, len(signals.pairs))] - part.offset
    final = strategy.select(
        signals.only(mine),
        min(part.n, len(kept)),
        eligible=None if eligible is None else eligible.only(mine),
        group=group,
        show_progress=show_progress,
    )
    return Ranking(kept[final.indices], final.scores, final.touched)


def check_preselectable(strategy: Strategy) -> None:
    """Raise `ActiveDPOError` unless the strategy can pick in two stages."""
    if not strategy.preselectable:
        able = [name for name, known in STRATEGIES.items() if known.preselectable]
        raise ActiveDPOError(
            f"preselect: the strategy {strategy.name!r} does not pick by gradient rows of the "
            f"candidate pairs alone: use one of {', '.join(able)}, or leave preselect out"
        )


def _first_rules(
    eligible: Eligible, per_pick: int, part: Part, group: dist.ProcessGroup | None
) -> Eligible:
    """Return the rules of the first stage; its first picks are the random ones of the second."""
    order, drawn = eligible.random_order, torch.empty(0, dtype=torch.int64)
    if order is not None:
        zeros = torch.zeros(len(order), dtype=torch.float64)
        everything = eligible.only(slice(None))
        drawn = rank_top(zeros, zeros, eligible.n_random, everything, group).indices
        order = order.clone()
        own = _in_part(drawn, part, len(order))
        order[drawn[own] - part.offset] = own.nonzero().flatten() - len(drawn)
    return eligible.roomier(per_pick, order, len(drawn))


def _in_part(indices: Tensor, part: Part, count: int) -> Tensor:
    """Return which candidates are among this process's `count`, bool [m]."""
    return (indices >= part.offset) & (indices < part.offset + count)

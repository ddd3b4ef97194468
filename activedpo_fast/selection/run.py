"""The path from candidates to picks: apply rules, run the strategy, build the picks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.template import own_template_kwargs, template_kwargs
from activedpo_fast.selection.candidates import Candidates
from activedpo_fast.selection.eligible import warn_if_fewer
from activedpo_fast.selection.greedy.contest import check_n
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.preselection import select_in_two_stages
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies import Strategy

logger = logging.getLogger(__name__)


def run_selection(
    candidates: Candidates,
    signals: Signals,
    strategy: Strategy,
    n: int,
    *,
    rules: PickRules | None = None,
    preselect: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    show_progress: bool | None = None,
) -> Selection:
    """Return the n candidates that the strategy picks under the rules, best first.

    If there are fewer, or the rules leave fewer, it returns those and logs it. If there are none,
    the selection is empty, and what that means is left to the caller.

    Args:
        signals: of this process's part of the candidates.
        preselect: pairs per pick that cheap rows choose first; None to pick from all at once.
        chat_template_kwargs: those that the whole pool was tokenized with; stored in the picks.
        group: the processes that select together; all return the same result.

    Raises:
        ActiveDPOError: n is not an integer from 0; rules that do not fit the pool or leave no
            candidate; any error of the strategy.
    """
    first = group is None or dist.get_rank(group) == 0
    asked = check_n(n, None)
    n = min(asked, len(candidates.pairs))
    eligible = None
    if rules is not None:
        eligible = rules.bind(candidates.pool, candidates.pairs, n)
        if group is not None:
            eligible = eligible.only(slice(candidates.mine.start, candidates.mine.stop))
    select: Callable[..., Ranking] = strategy.select
    if preselect is not None:
        select = partial(select_in_two_stages, strategy, preselect)
    ranking = select(signals, n, eligible=eligible, group=group, show_progress=show_progress)
    picked = len(ranking.indices)
    if first and picked:
        if picked == n < asked:
            logger.warning(
                "%d pairs are picked instead of %d: there are no other candidates", picked, asked
            )
        elif eligible is not None:
            warn_if_fewer(picked, asked, eligible)
    return _selection_of(
        candidates.pool, candidates.pairs, ranking, strategy.name, chat_template_kwargs
    )


def tells_nothing(picked: Selection, rules: PickRules | None) -> bool:
    """Return whether all scores are 0, except of random picks: any pairs would be as good."""
    at_random = picked.strategy == "random" or (rules is not None and rules.random_fraction > 0)
    return bool(picked) and not at_random and not any(pick.score for pick in picked)


def _selection_of(
    pool: PreferencePool,
    pairs: Tensor,
    ranking: Ranking,
    strategy: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Selection:
    """Return the picks described by a ranking of candidate `pairs`."""
    picks = []
    ranked = zip(ranking.indices.tolist(), ranking.scores.tolist(), strict=True)
    for rank, (index, score) in enumerate(ranked):
        (position, first), (_, second) = (pool.locate(row) for row in pairs[index].tolist())
        item = pool[position]
        arguments = template_kwargs(item.extra, chat_template_kwargs) if pool.is_chat else None
        own = own_template_kwargs(item.extra) if pool.is_chat else None
        pair, responses = (first, second), (item.responses[first], item.responses[second])
        picks.append(
            Pick(item.id, pair, score, rank, item.prompt, responses, arguments or None, own)
        )
    return Selection(tuple(picks), strategy)

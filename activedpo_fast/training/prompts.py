"""The prompts of a run: which are offered at all, which in a round, and their current columns."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.columns import check_json_columns
from activedpo_fast.pool.items import Prompt, check_prompts
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.reading import as_prompts
from activedpo_fast.selection.prompts import distinct_prompts
from activedpo_fast.selection.rules import PickRules, check_is_rules
from activedpo_fast.training.recorded import plain

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def read_and_offer(
    prompts: Sequence[Prompt] | datasets.Dataset, rules: PickRules | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Return all prompts, and those that may get responses: distinct, and not excluded.

    Raises:
        ActiveDPOError: malformed prompts, rules that do not fit them, or none that is left.
    """
    check_is_rules(rules)
    found = list(as_prompts(prompts))
    check_prompts(found)
    for n, prompt in enumerate(found, start=1):
        check_json_columns(prompt.extra, f"prompt {n}")
    excluded: set[str] = set()
    if rules is not None:
        rules.check(found)
        excluded.update(rules.excluded(found))
    distinct = distinct_prompts(found, None if rules is None else rules.prompt_by)
    if len(distinct) < len(found):
        logger.info(
            "%d of %d prompts repeat the text of an earlier one: it is offered once, "
            "under its first id",
            len(found) - len(distinct),
            len(found),
        )
    offered = [prompt for prompt in distinct if prompt.id not in excluded]
    if not offered:
        raise ActiveDPOError("exclude: no prompt is left")
    return found, offered


def draw_prompts(
    prompts: Sequence[Prompt], t: int, n: int, asked: set[str], seed: int
) -> list[Prompt]:
    """Return the prompts of round t: up to `n` distinct ones, those in `asked` last.

    The order is a permutation that depends on `seed`, starting at t·n and wrapping around.
    """
    order = list(prompts)
    random.Random(seed).shuffle(order)
    if t == 0 and n > len(order):
        logger.info(
            "prompts_per_round is %d, and there are %d prompts: every round takes them all",
            n,
            len(order),
        )
    first = t * n % len(order)
    order = order[first:] + order[:first]
    fresh = [prompt for prompt in order if prompt.id not in asked]
    if len(fresh) < min(n, len(order)):
        logger.warning(
            "round %d: only %d prompts have no labels yet; %d others are offered again",
            t,
            len(fresh),
            min(n, len(order)) - len(fresh),
        )
    return [*fresh, *(prompt for prompt in order if prompt.id in asked)][:n]


def with_columns_of_now(
    pool: PreferencePool, prompts: Sequence[Prompt], round_name: str
) -> PreferencePool:
    """Return the pool with its prompts' current columns, which rules and oracles read."""
    columns = {prompt.id: plain(prompt.extra) for prompt in prompts}
    changed = sorted(
        {
            name
            for item in pool
            for extra in [columns.get(item.id, item.extra)]
            for name in {**item.extra, **extra}
            if item.extra.get(name) != extra.get(name)
        }
    )
    if not changed:
        return pool
    logger.info(
        "%s: columns of the prompts have changed and are read as they are now: %s",
        round_name,
        ", ".join(changed),
    )
    return PreferencePool(replace(item, extra=columns.get(item.id, item.extra)) for item in pool)

"""The prompts of a run: which are offered at all, which in a round, and their current columns."""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeVar

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.columns import check_json_columns
from activedpo_fast.pool.items import PoolItem, Prompt, check_prompts
from activedpo_fast.pool.pool import PreferencePool, as_pool
from activedpo_fast.pool.reading import as_prompts
from activedpo_fast.pool.template import own_template_kwargs
from activedpo_fast.pool.texts import Text, canonical_json
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.prompts import distinct_prompts, text_key
from activedpo_fast.selection.rules import PickRules, check_is_rules
from activedpo_fast.settings import LoopConfig
from activedpo_fast.training.recorded import plain

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

One = TypeVar("One")


def read_and_offer(
    prompts: Sequence[Any] | datasets.Dataset, rules: PickRules | None, *, given: bool
) -> tuple[list[Any], list[Any]]:
    """Return all prompts, and those that are offered: distinct, and not excluded.

    They are `Prompt`s or, with `given`, `PoolItem`s.

    Args:
        given: their responses are given with them: they are the items of a pool, of which all are
            distinct, also those with the same prompt.

    Raises:
        ActiveDPOError: malformed prompts, rules that do not fit them, or none that is left.
    """
    check_is_rules(rules)
    if given:
        found: list[Any] = list(as_pool(prompts))
    else:
        found = list(as_prompts(prompts))
        check_prompts(found)
    for n, prompt in enumerate(found, start=1):
        check_json_columns(prompt.extra, f"prompt {n}")
    excluded: set[str] = set()
    if rules is not None:
        rules.check(found)
        excluded.update(rules.excluded(found))
    prompt_by = None if rules is None else rules.prompt_by
    distinct = found if given else distinct_prompts(found, prompt_by)
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
    if t == 0 and n > len(prompts):
        logger.info(
            "prompts_per_round is %d, and there are %d prompts: every round takes them all",
            n,
            len(prompts),
        )
    order = _rotated(prompts, t, n, seed)
    fresh = [prompt for prompt in order if prompt.id not in asked]
    if len(fresh) < min(n, len(order)):
        logger.warning(
            "round %d: only %d prompts have no labels yet; %d others are offered again",
            t,
            len(fresh),
            min(n, len(order)) - len(fresh),
        )
    return [*fresh, *(prompt for prompt in order if prompt.id in asked)][:n]


def draw_items(
    items: Sequence[PoolItem], t: int, picks: Iterable[Pick], args: LoopConfig
) -> PreferencePool:
    """Return up to `prompts_per_round` items of a given pool for round t, as `draw_prompts` orders.

    Args:
        picks: those of earlier rounds. Items all of whose pairs were picked, from whichever item
            with the same texts, are left out; the others that had a pick come last.

    Raises:
        ActiveDPOError: none has a pair left.
    """
    picks = list(picks)
    ids = {pick.id for pick in picks}
    picked = {
        (_prompt_texts(pick.prompt, pick.item_chat_template_kwargs), _pair_texts(pick.responses))
        for pick in picks
    }
    order = _rotated(items, t, args.prompts_per_round, args.seed)
    left = [item for item in order if _has_another_pair(item, picked)]
    if not left:
        raise ActiveDPOError(f"round {t}: all pairs of the pool are labeled: lower rounds")
    left.sort(key=lambda item: item.id in ids)
    return PreferencePool(left[: args.prompts_per_round])


def check_pairs(offered: Sequence[Any], args: LoopConfig) -> None:
    """Refuse batches that the prompts of a round, or a given pool in all rounds, cannot fill."""
    prompts = min(args.prompts_per_round, len(offered))
    if args.responses == "given":
        counts = sorted(map(_n_pairs, offered), reverse=True)
        pairs, responses = sum(counts[:prompts]), "their given"
        if (args.rounds - 1) * args.batch_size >= sum(counts):
            raise ActiveDPOError(
                f"loop.rounds: {args.rounds} rounds of {args.batch_size} pairs are more than the "
                f"{sum(counts)} of the pool"
            )
    else:
        per_prompt = args.num_generations * (args.num_generations - 1) // 2
        pairs, responses = prompts * per_prompt, str(args.num_generations)
    if pairs < args.batch_size:
        raise ActiveDPOError(
            f"loop.batch_size: {args.batch_size} pairs are to be picked, but "
            f"{prompts} prompts with {responses} responses have {pairs}"
        )


def _has_another_pair(item: PoolItem, picked: Collection[tuple[Any, Any]]) -> bool:
    prompt = _prompt_texts(item.prompt, own_template_kwargs(item.extra))
    return any(
        (prompt, _pair_texts(pair)) not in picked for pair in combinations(item.responses, 2)
    )


def _prompt_texts(prompt: Text, own: dict[str, Any] | None) -> Any:
    """Return a key of a prompt; of chat messages, with the row's own arguments of the template."""
    return text_key(prompt), None if isinstance(prompt, str) or not own else canonical_json(own)


def _pair_texts(responses: Sequence[Text]) -> frozenset[Any]:
    return frozenset(map(text_key, responses))


def _n_pairs(item: PoolItem) -> int:
    return len(item.responses) * (len(item.responses) - 1) // 2


def _rotated(prompts: Sequence[One], t: int, n: int, seed: int) -> list[One]:
    order = list(prompts)
    random.Random(seed).shuffle(order)
    first = t * n % len(order)
    return order[first:] + order[:first]


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

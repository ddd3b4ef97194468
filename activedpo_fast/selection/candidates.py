"""Candidate pairs of a pool, the labeled pairs, and each process's part of the pool."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from activedpo_fast.distributed.pool_parts import PoolPart, PoolProcesses
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.prompts import PairFinder, PoolPrompts, first_of_each
from activedpo_fast.selection.rules import PickRules

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidates:
    """The starting point of a selection from a pool; the same in all processes except `part`.

    Attributes:
        pairs: int64 [N, 2], row numbers of the pairs that may be picked.
        labeled: int64 [t, 2], row numbers of the pairs of the pool that have a preference.
        prompts: which items of the pool share a prompt.
        part: this process's part of the pool; the whole pool if there is only one process.
    """

    pool: PreferencePool
    pairs: Tensor
    labeled: Tensor
    prompts: PoolPrompts
    part: PoolPart

    @classmethod
    def find(
        cls,
        pool: PreferencePool,
        processes: PoolProcesses,
        *,
        labeled: Tensor,
        asked: Tensor,
        skipped: Sequence[int],
        rules: PickRules | None,
    ) -> Candidates:
        """Return all pairs except those labeled, asked before, or of skipped items.

        Args:
            labeled, asked: int64 [., 2], row numbers of pairs with and without a preference.
            skipped: positions of items that DPOTrainer would drop.
            rules: `prompt_by` defines which items share a prompt.
        """
        prompts = PoolPrompts.of(pool, None if rules is None else rules.prompt_by)
        pairs = candidate_pairs(
            pool, torch.cat([labeled, asked]), skipped, prompts, log=processes.rank == 0
        )
        return cls(pool, pairs, labeled, prompts, processes.part(pool))

    @property
    def mine(self) -> range:
        """The range of `pairs` that belongs to this process's part."""
        return self.part.pairs(self.pairs)

    @property
    def own_pairs(self) -> Tensor:
        """The pairs of `mine`, with rows numbered from the part's first row."""
        return self.pairs[self.mine.start : self.mine.stop] - self.part.rows.start


def candidate_pairs(
    pool: PreferencePool,
    known: Tensor,
    skipped: Sequence[int],
    prompts: PoolPrompts | None = None,
    *,
    log: bool = True,
) -> Tensor:
    """Return all pairs of `pool` except known ones and those of skipped items; int64 [N, 2].

    If several items have the same prompt and responses, the pair is included once, from the first
    item; the number of pairs left out for this reason is logged.

    Args:
        known: int64 [t, 2], pairs of row numbers in either order.
        skipped: positions of items.
        prompts: of `pool`; derived from its texts if not given.
    """
    prompts = PoolPrompts.of(pool) if prompts is None else prompts
    pairs = pool.pairs()
    code = prompts.pair_codes(pairs)
    keep = torch.ones(len(pairs), dtype=torch.bool)
    if len(known):
        keep &= ~torch.isin(code, prompts.pair_codes(known))
    if len(skipped):
        item = torch.searchsorted(pool.response_offsets, pairs[:, 0].contiguous(), right=True) - 1
        keep &= ~torch.isin(item, torch.tensor(list(skipped)))
    pairs, code = pairs[keep], code[keep]
    if bool(prompts.repeats().any()):
        first = first_of_each(code)
        if log and not first.all():
            logger.info(
                "%d of %d pairs have the prompt and responses of an earlier one: each is a "
                "candidate once",
                int((~first).sum()),
                len(pairs),
            )
        pairs = pairs[first]
    return pairs


def split_history(pool: PreferencePool, history: Sequence[Pick]) -> tuple[Tensor, list[Pick]]:
    """Split labeled picks into pairs of `pool`, as int64 [t, 2] row numbers, and all others.

    A pick belongs to the item that has its texts: the item with its id, or else the first match.
    """
    inside: list[list[int]] = []
    elsewhere: list[Pick] = []
    finder = PairFinder(pool)
    for pick in history:
        rows = finder.rows(pick.id, pick.prompt, pick.responses, pick.item_chat_template_kwargs)
        if rows is None:
            elsewhere.append(pick)
        else:
            inside.append(rows)
    return torch.tensor(inside, dtype=torch.int64).view(-1, 2), elsewhere


def pool_text(pool: PreferencePool, rules: PickRules | None) -> str:
    """Return a text that is equal for two pools only if these rules cannot tell them apart."""
    names = () if rules is None else (rules.group_by, rules.cost, rules.prompt_by)
    columns = [name for name in names if name is not None]
    values = [[item.extra.get(name) for name in columns] for item in pool] if columns else []
    return repr((pool.fingerprint(), values))

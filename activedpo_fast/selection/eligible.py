"""Which candidates of a selection may still be picked, and how they are compared."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Limit(NamedTuple):
    """numbers: int64 [N], each candidate's prompt or group, -1 for one without a limit; room:
    int64, how many more may be picked of each number."""

    numbers: Tensor
    room: Tensor


class Eligible:
    """Which of N candidates may still be picked, and how they are ordered.

    Attributes:
        remaining: bool [N] on the CPU; candidates that may still be picked. Updated in place.
        inverse_cost: float64 [N], the factor that scores are multiplied by before they are compared
            with each other; None without costs.
        min_score: no pick may score less, whatever its cost; -inf for no limit.
        n_random: the number of random picks, which come first: the remaining candidates with
            the lowest `random_order`.
        random_order: int64 [N], each candidate's place in a permutation; None if n_random is 0.

    Created by `PickRules.bind`. One selection uses it up.
    """

    def __init__(
        self,
        remaining: Tensor,
        *,
        inverse_cost: Tensor | None = None,
        min_score: float = -math.inf,
        n_random: int = 0,
        random_order: Tensor | None = None,
        prompt: Tensor | None = None,
        max_per_prompt: int = 0,
        quota_group: Tensor | None = None,
        room: Collection[int] = (),
    ) -> None:
        """
        Args:
            prompt: int64 [N], the number of each candidate's prompt, in the whole pool if several
                processes select together; None for no limit.
            max_per_prompt: how many may be picked of each prompt.
            quota_group: int64 [N], the quota's group of each candidate or -1; None for no limit.
            room: how many may be picked of each group.
        """
        self.remaining = remaining.contiguous()
        self.inverse_cost = inverse_cost
        self.min_score = min_score
        self.n_random = n_random
        self.random_order = random_order
        self._prompt = prompt
        self._max_per_prompt = max_per_prompt
        self._picked: dict[int, int] = {}  # of each prompt
        if prompt is not None:
            # Candidates sorted by prompt, so that closing one prompt does not scan the others.
            self._by_prompt = prompt.argsort(stable=True)
            self._end = prompt.bincount().cumsum(0)
        self._quota_group = quota_group
        self._room = list(room)
        for number, most in enumerate(self._room):
            if most <= 0:
                self._close_group(number)

    @classmethod
    def everything(cls, n_candidates: int) -> Eligible:
        """Return an `Eligible` without rules: every candidate may be picked."""
        return cls(torch.ones(n_candidates, dtype=torch.bool))

    def only(self, which: slice | Tensor) -> Eligible:
        """Return the same rules for some of the candidates, before any pick.

        Each part counts how much room prompts and groups still have, so it must be informed of
        picks made by other parts (`record_elsewhere`).

        Args:
            which: a slice of them, or their numbers, int64 [m].
        """

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[which]

        return Eligible(
            self.remaining[which].clone(),
            inverse_cost=cut(self.inverse_cost),
            min_score=self.min_score,
            n_random=self.n_random,
            random_order=cut(self.random_order),
            prompt=cut(self._prompt),
            max_per_prompt=self._max_per_prompt,
            quota_group=cut(self._quota_group),
            room=self._room,
        )

    def roomier(self, factor: int, random_order: Tensor | None, n_random: int) -> Eligible:
        """Return rules with `factor` times the room, no least score, and other random picks.

        Args:
            factor: of `max_per_prompt` and of the room of every group, from 1.
            random_order, n_random: as of the constructor.
        """
        return Eligible(
            self.remaining.clone(),
            inverse_cost=self.inverse_cost,
            n_random=n_random,
            random_order=random_order,
            prompt=self._prompt,
            max_per_prompt=factor * self._max_per_prompt,
            quota_group=self._quota_group,
            room=[factor * room for room in self._room],
        )

    def record_pick(self, index: int) -> None:
        """Record the pick of candidate `index`: close it, and its prompt and group if now full."""
        self.remaining[index] = False
        self.record_elsewhere(self.quota_group_of(index), self.prompt_of(index))

    def factors(self, indices: Tensor) -> Tensor:
        """Return what scores of candidates [m] are multiplied by to be compared, float64 [m]."""
        if self.inverse_cost is None:
            return torch.ones(len(indices), dtype=torch.float64)
        return self.inverse_cost[indices]

    def limits(self) -> tuple[Limit | None, Limit | None]:
        """Return how many candidates of each prompt, and of each group, may still be picked."""
        by_prompt = by_quota_group = None
        if self._prompt is not None:
            room = torch.full((len(self._end),), self._max_per_prompt)
            for prompt, picked in self._picked.items():
                if prompt < len(room):
                    room[prompt] -= picked
            by_prompt = Limit(self._prompt, room)
        if self._quota_group is not None:
            by_quota_group = Limit(self._quota_group, torch.tensor(self._room, dtype=torch.int64))
        return by_prompt, by_quota_group

    def quota_group_of(self, index: int) -> int:
        """Return the number of a candidate's group, -1 if it is in none that has a quota."""
        return -1 if self._quota_group is None else int(self._quota_group[index])

    def prompt_of(self, index: int) -> int:
        """Return the number of a candidate's prompt, -1 if prompts have no limit."""
        return -1 if self._prompt is None else int(self._prompt[index])

    def record_elsewhere(self, quota_group: int, prompt: int = -1) -> None:
        """Record a pick of these numbers of group and prompt (-1: none), such as one made by
        another process."""
        if prompt >= 0 and self._prompt is not None:
            self._picked[prompt] = self._picked.get(prompt, 0) + 1
            if self._picked[prompt] >= self._max_per_prompt and prompt < len(self._end):
                start = int(self._end[prompt - 1]) if prompt else 0
                self.remaining[self._by_prompt[start : int(self._end[prompt])]] = False
        if quota_group < 0:
            return
        self._room[quota_group] -= 1
        if self._room[quota_group] <= 0:
            self._close_group(quota_group)

    def _close_group(self, quota_group: int) -> None:
        assert self._quota_group is not None
        self.remaining &= self._quota_group != quota_group


def random_order(n_candidates: int, seed: int) -> Tensor:
    """Return each candidate's place in the permutation given by `seed`; int64 [N]."""
    drawn = torch.randperm(n_candidates, generator=torch.Generator().manual_seed(seed))
    return drawn.argsort()


def warn_if_fewer(picked: int, n: int, eligible: Eligible) -> None:
    """Log a warning if `picked`, the number of picks, is less than n."""
    if picked < n:
        least = eligible.min_score
        which = "" if least == -math.inf else f" that scores {least} or more"
        logger.warning(
            "%d of %d pairs picked: the rules leave no other candidate%s", picked, n, which
        )

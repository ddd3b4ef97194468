"""A number for each response from outside the policy: a column of the pool, or a function."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from reprlib import repr as show
from typing import Any, Protocol

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.texts import Text

_LARGEST = sys.float_info.max / 4  # so that differences are finite, too


class Reward(Protocol):
    """A function that gives one number per response; higher is better."""

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        extras: Sequence[Mapping[str, Any]],
    ) -> Sequence[float]: ...


def rewards_of(pool: PreferencePool, reward: str | Reward) -> Tensor:
    """Return the reward of every response of `pool`, float64 [R], in the pool's order.

    Args:
        reward: the column of the pool that has a list of numbers, one for each response of the
            item; or a function that is called once with all prompts and responses, and for each the
            other columns of its item.

    Raises:
        ActiveDPOError: a missing column, a wrong number of rewards, or one that is not a finite
            number, naming the item.
    """
    if isinstance(reward, str):
        found = [float(number) for item in pool for number in _of_item(item, reward)]
        return torch.tensor(found, dtype=torch.float64)
    rows = [(item, response) for item in pool for response in item.responses]
    found = []
    if rows:  # a process of several may have no item
        found = call_reward(
            reward,
            [item.id for item, _ in rows],
            [item.prompt for item, _ in rows],
            [response for _, response in rows],
            [item.extra for item, _ in rows],
        )
    return torch.tensor(found, dtype=torch.float64)


def call_reward(
    reward: Reward,
    ids: Sequence[str],
    prompts: Sequence[Text],
    responses: Sequence[Text],
    extras: Sequence[Mapping[str, Any]],
) -> list[float]:
    """Return the reward of each response; `ids` are those of their prompts, for messages.

    Raises:
        ActiveDPOError: a wrong number of rewards, or one that is no number or not finite.
    """
    given = reward(prompts, responses, extras)
    try:
        rewards = [float(value) for value in given]
    except (TypeError, ValueError, OverflowError) as error:
        raise ActiveDPOError(
            f"the reward should give a number for each of {len(responses)} responses, not "
            f"{show(given)}"
        ) from error
    if len(rewards) != len(responses):
        raise ActiveDPOError(
            f"the reward gave {len(rewards)} numbers for {len(responses)} responses"
        )
    for id, value in zip(ids, rewards, strict=True):
        if not _is_usable(value):
            raise ActiveDPOError(f"the reward of a response to id {id!r} is {value}")
    return rewards


def _of_item(item: Any, column: str) -> Sequence[float]:
    numbers = item.extra.get(column)
    if numbers is None:
        raise ActiveDPOError(
            f"item {item.id!r} has no column {column!r}, which should have a reward for each of "
            "its responses; name the column that has them, or give the strategy a function"
        )
    if not (
        isinstance(numbers, Sequence)
        and len(numbers) == len(item.responses)
        and all(isinstance(n, Real) and not isinstance(n, bool) and _is_usable(n) for n in numbers)
    ):
        raise ActiveDPOError(
            f"item {item.id!r}: {column!r} should have {len(item.responses)} finite numbers, one "
            f"for each response, not {show(numbers)}"
        )
    return numbers


def _is_usable(value: Any) -> bool:
    """Return whether a number is finite and not so large that a difference would not be."""
    return bool(-_LARGEST <= value <= _LARGEST)

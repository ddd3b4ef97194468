"""Rules for picks: limits per prompt and group, excluded prompts, costs, random picks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from activedpo_fast._checks import is_count
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.items import PoolItem, Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.eligible import Eligible, random_order
from activedpo_fast.selection.prompts import PoolPrompts, name_of, same_prompt
from activedpo_fast.selection.signals import check_pairs


@dataclass(frozen=True)
class PickRules:
    """Rules that a selection follows, whatever the strategy.

    Args:
        max_per_prompt: the maximum number of pairs of one prompt in this selection, whichever rows
            of the pool they are in. Pairs labeled earlier do not count.
        exclude: ids of rows whose prompts are excluded, in all other rows too.
        group_by: the field of an item's `extra` that names its group: text, an integer or a
            boolean (the latter two as in JSON). An item without it is in no group.
        quotas: the maximum number of pairs per named group, 0 or more. Others are not limited.
        min_score: the criterion picks no pair with a lower score. This may return fewer pairs than
            requested, which is logged.
        random_fraction: of n picks, round(random_fraction * n) are drawn uniformly at random from
            the pairs that the rules allow. They are drawn first, so that the criterion takes them
            into account; `min_score` and `cost` do not apply to them.
        cost: the field of an item's `extra` with the cost of a label, a positive number. The
            criterion then picks the largest score / cost. Scores are returned, and compared with
            `min_score`, without the cost.
        prompt_by: the field of an item's `extra` that defines which items share a prompt: those
            with the same text, integer or boolean in it. By default, those with the same prompt
            text. It also decides which labeled pairs share a prompt.
        seed: of the random picks. Different pools get different draws.

    Raises:
        ActiveDPOError: a value of the wrong type or out of range, naming the rule.

    Examples:
        >>> from activedpo_fast import PickRules
        >>> rules = PickRules(max_per_prompt=1, group_by="topic", quotas={"cooking": 1})
        >>> picked = selector.select(pool, 3, rules=rules)
        >>> topics = {item.id: item.extra["topic"] for item in pool}
        >>> sorted(topics[pick.id] for pick in picked)
        ['cooking', 'science', 'science']
    """

    max_per_prompt: int | None = None
    exclude: Collection[str] = ()
    group_by: str | None = None
    quotas: Mapping[str, int] = field(default_factory=dict)
    min_score: float | None = None
    random_fraction: float = 0.0
    cost: str | None = None
    seed: int = 0
    prompt_by: str | None = None

    def __post_init__(self) -> None:
        if self.max_per_prompt is not None and not is_count(self.max_per_prompt, least=1):
            raise ActiveDPOError(
                f"max_per_prompt must be an integer from 1, not {self.max_per_prompt!r}"
            )
        object.__setattr__(self, "exclude", _ids(self.exclude))
        for name, value in (
            ("group_by", self.group_by),
            ("cost", self.cost),
            ("prompt_by", self.prompt_by),
        ):
            if value is not None and not (isinstance(value, str) and value):
                raise ActiveDPOError(f"{name} must be the name of a field, not {value!r}")
        object.__setattr__(self, "quotas", _quotas(self.quotas))
        if (self.group_by is None) != (not self.quotas):
            missing = "group_by" if self.quotas else "quotas"
            raise ActiveDPOError(f"{missing} missing: group_by and quotas go together")
        if self.min_score is not None and not _is_number(self.min_score):
            raise ActiveDPOError(f"min_score must be a finite number, not {self.min_score!r}")
        if not (_is_number(self.random_fraction) and 0 <= self.random_fraction <= 1):
            raise ActiveDPOError(
                f"random_fraction must be a number from 0 to 1, not {self.random_fraction!r}"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ActiveDPOError(f"seed must be an integer, not {self.seed!r}")

    def check(self, items: Collection[PoolItem | Prompt]) -> None:
        """Raise `ActiveDPOError` unless the rules fit these items.

        That is: every excluded id is an id of an item; every quota's group has an item; with
        `prompt_by`, every item names its prompt; with `cost`, every item that is not excluded has
        a cost.
        """
        ids = {item.id for item in items}
        unknown = [id for id in self.exclude if id not in ids]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise ActiveDPOError(f"exclude: no item has the id {unknown[0]!r}{more}")
        if self.group_by is not None:
            if all(self.group_by not in item.extra for item in items):
                columns = sorted({name for item in items for name in item.extra})
                raise ActiveDPOError(
                    f"group_by: there is no column {self.group_by!r}; the columns are "
                    f"{', '.join(columns) or 'the texts alone'}"
                )
            groups = {_group(item, self.group_by) for item in items}
            for group in self.quotas:
                if group not in groups:
                    raise ActiveDPOError(f"quotas: no item's {self.group_by!r} is {group!r}")
        excluded = self.excluded(items)
        if self.cost is not None:
            for item in items:
                if item.id not in excluded:
                    _cost(item, self.cost)

    def excluded(self, items: Iterable[PoolItem | Prompt]) -> set[str]:
        """Return the ids of all items whose prompt is excluded."""
        return same_prompt(items, self.exclude, self.prompt_by)

    def within(self, items: Iterable[PoolItem | Prompt]) -> PickRules:
        """Return the rules for a subset of the items, without the ids and groups of the others."""
        listed = list(items)
        ids = {item.id for item in listed}
        quotas: Mapping[str, int] = {}
        if self.group_by is not None:
            groups = {_group(item, self.group_by) for item in listed}
            quotas = {group: most for group, most in self.quotas.items() if group in groups}
        return dataclasses.replace(
            self,
            exclude=[id for id in self.exclude if id in ids],
            quotas=quotas,
            group_by=self.group_by if quotas else None,
        )

    def bind(self, pool: PreferencePool, pairs: Tensor, n: int) -> Eligible:
        """Apply the rules to the candidates of one selection.

        Args:
            pool: the pool that the pairs come from.
            pairs: int64 [N, 2] of row numbers.
            n: the number of pairs to pick.

        Raises:
            ActiveDPOError: rules that do not fit the pool (see `check`), or that leave no candidate
                although n > 0.
        """
        check_pairs(pairs, pool.n_responses, "pairs")
        self.check(pool)
        item = torch.searchsorted(pool.response_offsets, pairs[:, 0].contiguous(), right=True) - 1
        ids = self.excluded(pool)
        excluded = torch.tensor([one.id in ids for one in pool])
        quota_group: Tensor | None = None
        room: list[int] = []
        if self.group_by is not None:
            number: dict[str | None, int] = {name: i for i, name in enumerate(self.quotas)}
            of_item = [number.get(_group(one, self.group_by), -1) for one in pool]
            quota_group = torch.tensor(of_item)[item]
            room = list(self.quotas.values())
        inverse_cost = None
        if self.cost is not None:
            costs = [
                1.0 if out else _cost(one, self.cost)
                for one, out in zip(pool, excluded.tolist(), strict=True)
            ]
            inverse_cost = torch.tensor(costs, dtype=torch.float64).reciprocal()[item]
        n_random = round(self.random_fraction * n)
        order = None
        if n_random:
            order = random_order(len(pairs), random_seed(self.seed, pool.fingerprint()))
        prompt = None
        if self.max_per_prompt is not None:
            prompt = PoolPrompts.of(pool, self.prompt_by).of_item[item]
        eligible = Eligible(
            ~excluded[item],
            inverse_cost=inverse_cost,
            n_random=n_random,
            random_order=order,
            min_score=-math.inf if self.min_score is None else float(self.min_score),
            prompt=prompt,
            max_per_prompt=self.max_per_prompt or 0,
            quota_group=quota_group,
            room=room,
        )
        if n > 0 and len(pairs) and not eligible.remaining.any():
            raise ActiveDPOError(f"the rules leave none of {len(pairs)} candidate pairs")
        return eligible


def check_is_rules(rules: object) -> None:
    """Raise `ActiveDPOError` unless these are `PickRules`, or None."""
    if rules is not None and not isinstance(rules, PickRules):
        raise ActiveDPOError(f"rules: expected PickRules(...), got {type(rules).__name__}")


def random_seed(seed: int, pool_fingerprint: str) -> int:
    """Return the seed of random picks from a pool: different pools get different draws."""
    text = f"{seed}/{pool_fingerprint}".encode()
    return int.from_bytes(blake2b(text, digest_size=6).digest(), "big")


# -- validation of the rules' values ---------------------------------------------------------------


def _ids(given: Any) -> tuple[str, ...]:
    """Return the distinct ids in a fixed order; integers as text, as in a pool."""
    if isinstance(given, (str, Mapping)) or not isinstance(given, Collection):
        raise ActiveDPOError(f"exclude must be a list of ids, not {given!r}")
    for id in given:
        if isinstance(id, bool) or not isinstance(id, (str, int)):
            raise ActiveDPOError(f"exclude must be a list of ids; {id!r} is not an id")
    return tuple(sorted({str(id) for id in given}))


def _quotas(given: Any) -> dict[str, int]:
    if not isinstance(given, Mapping):
        raise ActiveDPOError(f"quotas must map groups to numbers of pairs, not be {given!r}")
    quotas = {}
    for key, most in given.items():
        name = name_of(key)
        if name is None:
            raise ActiveDPOError(f"quotas: {key!r} is not a group (text, integer or boolean)")
        if not is_count(most, least=0):
            raise ActiveDPOError(f"quotas: {name!r} must have an integer from 0, not {most!r}")
        quotas[name] = most
    return quotas


def _group(item: PoolItem | Prompt, name: str) -> str | None:
    """Return the item's group, or None if it has none."""
    value = item.extra.get(name)
    if value is None or value != value:  # tables mark missing values by NaN
        return None
    group = name_of(value)
    if group is None:
        raise ActiveDPOError(
            f"group_by: {name!r} of item {item.id!r} must be text, an integer or a boolean, not "
            f"{value!r}"
        )
    return group


def _cost(item: PoolItem | Prompt, name: str) -> float:
    if item.extra.get(name) is None:
        raise ActiveDPOError(f"cost: item {item.id!r} has no {name!r}")
    value = item.extra[name]
    # 1 / cost must be finite too, which it is not for the smallest floats.
    if not (_is_number(value) and float(value) > 0 and _is_number(1 / float(value))):
        raise ActiveDPOError(
            f"cost: {name!r} of item {item.id!r} must be a positive number, not {value!r}"
        )
    return float(value)


def _is_number(value: Any) -> bool:
    """Return whether `value` is a real number that a float can hold."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False

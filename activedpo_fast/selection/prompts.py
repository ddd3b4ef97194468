"""Identity of prompts and pairs: several rows of a pool may have the same texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.items import PoolItem, Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.template import own_template_kwargs
from activedpo_fast.pool.texts import Text, canonical_json


def text_key(text: Text) -> str | bytes:
    """Return a key that is equal for equal texts; chat messages by their canonical JSON."""
    return text if isinstance(text, str) else canonical_json(text)


def name_of(value: Any) -> str | None:
    """Return a column's value as a name: text, or an integer or boolean as in JSON; else None."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (str, int)) else None


def prompt_key(item: PoolItem | Prompt, prompt_by: str | None) -> str | bytes:
    """Return a key equal for items of one prompt: by text, or by value in the column `prompt_by`.

    Raises:
        ActiveDPOError: an item without the column, or with a value that cannot be a name.
    """
    if prompt_by is None:
        # With chat messages, a row's own template arguments are part of its text.
        own = None if isinstance(item.prompt, str) else own_template_kwargs(item.extra)
        return canonical_json([item.prompt, own]) if own else text_key(item.prompt)
    value = item.extra.get(prompt_by)
    if value is None or value != value:  # tables mark missing values by NaN
        raise ActiveDPOError(f"prompt_by: item {item.id!r} has no {prompt_by!r}")
    name = name_of(value)
    if name is None:
        raise ActiveDPOError(
            f"prompt_by: {prompt_by!r} of item {item.id!r} must be text, an integer or a boolean, "
            f"not {value!r}"
        )
    return name


def distinct_prompts(prompts: Sequence[Prompt], prompt_by: str | None) -> list[Prompt]:
    """Return the prompts in order, without those that repeat another's text (and column)."""
    seen = {
        (prompt_key(prompt, prompt_by), text_key(prompt.prompt)): prompt
        for prompt in reversed(prompts)
    }
    first = {prompt.id for prompt in seen.values()}
    return [prompt for prompt in prompts if prompt.id in first]


def same_prompt(
    items: Iterable[PoolItem | Prompt], ids: Collection[str], prompt_by: str | None
) -> set[str]:
    """Return the ids of all items that share a prompt with an item in `ids`."""
    if not ids and prompt_by is None:
        return set()  # a column is always checked: every item must have it
    keys = {item.id: prompt_key(item, prompt_by) for item in items}
    known = {keys[id] for id in ids if id in keys}
    return {id for id, key in keys.items() if key in known}


@dataclass(frozen=True)
class PoolPrompts:
    """Which items of a pool share a prompt, and which of their responses are the same.

    Attributes:
        of_item: int64 [P], the number of each item's prompt; prompts are numbered from 0 in order
            of first appearance.
        first_row: int64 [R], for each response row, the first row with the same prompt and
            response.
    """

    of_item: Tensor
    first_row: Tensor

    @classmethod
    def of(cls, pool: PreferencePool, prompt_by: str | None = None) -> PoolPrompts:
        """Return the prompts of `pool`; see `prompt_key` for `prompt_by` and errors."""
        numbers: dict[str | bytes, int] = {}
        of_item = [numbers.setdefault(prompt_key(item, prompt_by), len(numbers)) for item in pool]
        first_row = torch.arange(pool.n_responses)
        count = Counter(of_item)
        rows: dict[tuple[int, str | bytes], int] = {}
        for item, number, offset in zip(
            pool, of_item, pool.response_offsets.tolist(), strict=False
        ):
            if count[number] > 1:
                for row, response in enumerate(item.responses, start=offset):
                    first_row[row] = rows.setdefault((number, text_key(response)), row)
        return cls(torch.tensor(of_item), first_row)

    def pair_codes(self, pairs: Tensor) -> Tensor:
        """Return a number for each pair of rows, int64 [N, 2] to [N], equal for equal texts."""
        rows = self.first_row[pairs]
        return rows.amin(dim=1) * len(self.first_row) + rows.amax(dim=1)

    def of_row(self, pool: PreferencePool) -> Tensor:
        """Return the number of each response row's prompt, int64 [R]."""
        return torch.repeat_interleave(self.of_item, pool.response_offsets.diff())

    def repeats(self) -> Tensor:
        """Return which rows repeat an earlier row's prompt and response, bool [R]."""
        return self.first_row != torch.arange(len(self.first_row))


def first_of_each(codes: Tensor) -> Tensor:
    """Return bool [N]: whether no earlier code in codes [N] is equal."""
    order = codes.argsort(stable=True)
    again = torch.zeros(len(codes), dtype=torch.bool)
    again[order[1:]] = codes[order].diff() == 0
    return ~again


_ANY: dict[str, Any] = {}  # matches any template arguments of an item


class PairFinder:
    """Finds the rows of a pool that have given texts."""

    def __init__(self, pool: PreferencePool) -> None:
        self._pool = pool
        self._offsets = pool.response_offsets.tolist()
        self._by_id = {item.id: position for position, item in enumerate(pool)}
        self._by_text: dict[str | bytes, list[int]] | None = None

    def rows(
        self, id: str, prompt: Text, responses: Sequence[Text], own: dict[str, Any] | None = _ANY
    ) -> list[int] | None:
        """Return the rows of two responses to `prompt` in one item: item `id`, or else the first.

        Return None if no item has both. `own` are the chat template arguments that the item itself
        must have; by default, any match.
        """
        with_id = self._by_id.get(id)
        found = None if with_id is None else self._rows_in(with_id, prompt, responses, own)
        if found is None:
            for position in self._with_text(prompt):
                found = self._rows_in(position, prompt, responses, own)
                if found is not None:
                    return found
        return found

    def _with_text(self, prompt: Text) -> list[int]:
        if self._by_text is None:
            self._by_text = {}
            for position, item in enumerate(self._pool):
                self._by_text.setdefault(text_key(item.prompt), []).append(position)
        return self._by_text.get(text_key(prompt), [])

    def _rows_in(
        self, position: int, prompt: Text, responses: Sequence[Text], own: dict[str, Any] | None
    ) -> list[int] | None:
        item, offset = self._pool[position], self._offsets[position]
        if item.prompt != prompt:
            return None
        if not (isinstance(prompt, str) or own is _ANY or own_template_kwargs(item.extra) == own):
            return None
        rows = [offset + item.responses.index(r) for r in responses if r in item.responses]
        return rows if len(rows) == 2 and rows[0] != rows[1] else None

"""The labeling interface, and labels from a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.texts import Text
from activedpo_fast.selection.result import Selection, check_label


class Oracle(Protocol):
    """Whoever says which of two responses is better."""

    def label(self, selection: Selection, pool: PreferencePool | None = None) -> list[int | None]:
        """One label a pick, in order: the index (0 or 1) of the preferred of `pick.responses`.

        None is for no preference. `pool`, where the selection was made from, gives access to the
        other columns of the items.
        """
        ...


class CallableOracle:
    """Labels from `fn(prompt, response_a, response_b)`: 0 (a is better), 1, or None.

    Raises:
        ActiveDPOError: from `label`, for any other value; it names the pick.
    """

    def __init__(self, fn: Callable[[Text, Text, Text], int | None]) -> None:
        self._fn = fn

    def label(self, selection: Selection, pool: PreferencePool | None = None) -> list[int | None]:
        return [
            check_label(self._fn(pick.prompt, *pick.responses), f"label of id {pick.id!r}")
            for pick in selection
        ]

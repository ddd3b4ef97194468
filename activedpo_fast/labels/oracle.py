"""The labeling interface, and labels from a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.texts import Text
from activedpo_fast.selection.result import Selection, check_label

if TYPE_CHECKING:
    import datasets


class Oracle(Protocol):
    """A source of labels that say which of two responses is better."""

    def label(self, selection: Selection, pool: PreferencePool | None = None) -> list[int | None]:
        """Return one label per pick, in order: the index (0 or 1) of the preferred response.

        The index is into `pick.responses`; None means no preference. `pool`, from which the
        selection was made, gives access to the other columns of the items.
        """
        ...


class CallableOracle:
    """Labels from `fn(prompt, response_a, response_b)`: 0 (a is better), 1, or None.

    Raises:
        ActiveDPOError: from `label`, for any other value; the message names the pick.

    Examples:
        >>> from activedpo_fast.labels import CallableOracle
        >>> def prefer_shorter(prompt, a, b):
        ...     return None if len(a) == len(b) else int(len(b) < len(a))
        >>> labels = CallableOracle(prefer_shorter).label(picked)
        >>> all(len(row["chosen"]) < len(row["rejected"]) for row in picked.to_dataset(labels))
        True
    """

    def __init__(self, fn: Callable[[Text, Text, Text], int | None]) -> None:
        self._fn = fn

    def label(
        self, selection: Selection, pool: PreferencePool | datasets.Dataset | None = None
    ) -> list[int | None]:
        return [
            check_label(self._fn(pick.prompt, *pick.responses), f"label of id {pick.id!r}")
            for pick in selection
        ]

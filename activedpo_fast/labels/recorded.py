"""Preferences that a data set already has, revealed for the pairs that are picked."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from activedpo_fast._files import FilePath
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.columns import is_absent
from activedpo_fast.pool.files import PlacedRows, dataset_rows, is_from_datasets, placed_rows
from activedpo_fast.pool.items import PoolItem, check_item
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.reading import id_of, item_from_row, plain_text
from activedpo_fast.pool.texts import Text, canonical_json, content_id
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.prompts import prompt_key, text_key
from activedpo_fast.selection.result import Selection

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class RecordedOracle:
    """The preferences of a DPO data set, to simulate active learning on data that is labeled.

    `pool` has the pairs without their preferences: the order of the two responses is that of a hash
    of their texts. Select from it, or run `ActiveDPOLoop` on it with `responses="given"`; `label`
    reveals the preferences of the picks.

    Rows whose two responses are the same, and rows that repeat the prompt and the pair of an
    earlier one, with the same preference or the opposite, are left out; the log counts them.

    Args:
        source: rows with `prompt`, `chosen` and `rejected`: a file or folder as in
            `PreferencePool.load`, a `datasets.Dataset`, or mappings. `id` and other columns are
            read as those of a pool.

    Attributes:
        pool: the pairs.
        preferences: a hash of the pairs and of which response is the chosen one.

    Raises:
        ActiveDPOError: a bad row, which is named; from `label`, a pick that is not of `pool`.

    Examples:
        >>> from activedpo_fast.labels import RecordedOracle
        >>> oracle = RecordedOracle([
        ...     {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " Go away."},
        ...     {"prompt": "Name a color.", "chosen": " Red.", "rejected": " Dog."},
        ... ])
        >>> picked = selector.select(oracle.pool, 1)
        >>> train_dataset = picked.to_dataset(oracle.label(picked))
        >>> train_dataset[0]["chosen"] in (" Hello!", " Red.")
        True
    """

    def __init__(self, source: FilePath | datasets.Dataset | Sequence[Mapping[str, Any]]) -> None:
        if isinstance(source, PreferencePool):
            raise ActiveDPOError(
                "a pool does not say which response is preferred: give RecordedOracle rows with "
                "chosen and rejected, and select from its pool"
            )
        items, self._chosen = _read(source)
        self.pool = PreferencePool(items)
        self.preferences = hashlib.sha256(
            canonical_json([self.pool.fingerprint(), [self._chosen[item.id] for item in items]])
        ).hexdigest()

    def label(
        self, selection: Selection, pool: PreferencePool | datasets.Dataset | None = None
    ) -> list[int | None]:
        return [self._revealed(pick) for pick in selection]

    def _revealed(self, pick: Pick) -> int:
        if pick.id in self._chosen:
            item = self.pool[self.pool.position(pick.id)]
            if pick.prompt == item.prompt:
                for order in ((0, 1), (1, 0)):
                    if list(pick.responses) == [item.responses[n] for n in order]:
                        return order.index(self._chosen[pick.id])
        raise ActiveDPOError(
            f"pair {list(pick.pair)} of id {pick.id!r} has no recorded preference: select from the "
            "oracle's own pool (RecordedOracle.pool; in a run file, loop.responses: given)"
        )


def _read(
    source: FilePath | datasets.Dataset | Sequence[Mapping[str, Any]],
) -> tuple[list[PoolItem], dict[str, int]]:
    """Return the items, and for each id the position of the chosen response."""
    items: list[PoolItem] = []
    chosen: dict[str, int] = {}
    place_of: dict[str, str] = {}
    seen: dict[tuple[Any, ...], Any] = {}
    same = repeated = opposite = 0
    for place, row in _placed(source):
        if not isinstance(row, Mapping) or any(
            is_absent(row.get(name)) for name in ("chosen", "rejected")
        ):
            raise ActiveDPOError(
                f"{place}: recorded preferences need the columns 'chosen' and 'rejected'"
            )
        if plain_text(row["chosen"]) == plain_text(row["rejected"]):
            same += 1
            continue
        item = item_from_row(row, place)
        check_item(item, place)
        preferred, other = map(text_key, item.responses)
        key = prompt_key(item, None), frozenset((preferred, other))
        if key in seen:
            repeated += seen[key] == preferred
            opposite += seen[key] != preferred
            continue
        seen[key] = preferred
        shown = sorted(item.responses, key=_hash)
        own_id = id_of(row) is not None
        id = item.id if own_id else content_id(item.prompt, shown)  # not of the order in the row
        if id in chosen:
            raise ActiveDPOError(f"{place}: id {id!r} is already that of {place_of[id]}")
        place_of[id] = place
        chosen[id] = shown.index(item.responses[0])
        items.append(replace(item, id=id, responses=tuple(shown)))
    if same or repeated or opposite:
        logger.warning(
            "recorded preferences: left out %d rows whose responses are the same, %d that repeat "
            "an earlier pair, and %d that repeat one with the opposite preference",
            same,
            repeated,
            opposite,
        )
    if not items:
        raise ActiveDPOError("recorded preferences: there are no pairs")
    return items, chosen


def _hash(text: Text) -> bytes:
    return hashlib.sha256(canonical_json(text)).digest()


def _placed(source: Any) -> PlacedRows:
    if isinstance(source, (str, os.PathLike)):
        return placed_rows(source)
    if is_from_datasets(source):
        return dataset_rows(source)
    if not isinstance(source, Sequence):
        raise ActiveDPOError(
            "recorded preferences: expected a path, a datasets.Dataset or a list of rows, got "
            f"{type(source).__name__}"
        )
    return _numbered(source)


def _numbered(rows: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for n, row in enumerate(rows, start=1):
        yield f"row {n}", row

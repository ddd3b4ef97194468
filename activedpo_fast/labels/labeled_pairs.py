"""Labeled pairs in a file, as rows of a pool: the input of `activedpo select --labeled`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from activedpo_fast._files import FilePath, check_characters
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.reading import read_label
from activedpo_fast.pool.files import jsonl_rows
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.template import own_template_kwargs
from activedpo_fast.selection.picks_jsonl import ITEM_TEMPLATE_FIELD
from activedpo_fast.selection.prompts import PairFinder

logger = logging.getLogger(__name__)


def read_labeled_pairs(
    path: FilePath, pool: PreferencePool, *, log: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pairs of `pool` that a JSONL file names by `id` and `pair`, as row numbers.

    If a line has `prompt` and `responses`, these identify the pair, regardless of its id and
    numbers; they must be in the pool.

    Returns:
        Two int64 [t, 2]: the pairs with a preference, which enter V, and those without. A pair has
        no preference if `label` is "skip" or "tie", or if it is not labeled yet (`label` is missing
        or null). The number of pairs not labeled yet is logged.

    Raises:
        ActiveDPOError: a bad line; the message names the first.
    """
    decided: list[list[int]] = []
    asked: list[list[int]] = []
    pending = 0
    seen: dict[tuple[str, frozenset[int]], str] = {}
    finder = PairFinder(pool)
    for place, record in jsonl_rows(Path(path)):
        check_characters(record, place)
        pair = _pair_of(record, place, pool, finder)
        earlier = seen.setdefault((str(record["id"]), frozenset(pair)), place)
        if earlier is not place:
            raise ActiveDPOError(f"{place}: the same pair as {earlier}")
        label = read_label(record, place)
        (decided if label in (0, 1) else asked).append(pair)
        pending += label is None
    if pending and log:
        logger.info(
            "%s: %d of %d pairs have no label yet: they are not picked again and do not enter V",
            path,
            pending,
            len(seen),
        )
    return _as_rows(decided), _as_rows(asked)


def _as_rows(pairs: list[list[int]]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def _pair_of(record: Any, place: str, pool: PreferencePool, finder: PairFinder) -> list[int]:
    """Return the two row numbers of a line, in its order."""
    if not isinstance(record, Mapping):
        raise ActiveDPOError(f"{place}: not a JSON object")
    for name in ("id", "pair"):
        if name not in record:
            raise ActiveDPOError(f"{place}: no {name!r}")
    found = _by_texts(record, finder)
    if found is not None:
        return found
    try:
        position = pool.position(str(record["id"]))
    except ActiveDPOError:
        raise ActiveDPOError(
            f"{place}: no item with id {record['id']!r} in the store's pool: its "
            "gradient row is not known"
        ) from None
    item, pair = pool[position], record["pair"]
    if not (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(n) is int for n in pair)
        and pair[0] != pair[1]
    ):
        raise ActiveDPOError(f"{place}: 'pair' must be two different response numbers")
    if not all(0 <= n < len(item.responses) for n in pair):
        raise ActiveDPOError(
            f"{place}: 'pair' is {pair}, but item {item.id!r} has {len(item.responses)} responses"
        )
    expected = {
        "prompt": item.prompt,
        "responses": [item.responses[n] for n in pair],
        ITEM_TEMPLATE_FIELD: own_template_kwargs(item.extra),
    }
    for name, value in expected.items():
        if record.get(name, value) != value:
            raise ActiveDPOError(
                f"{place}: {name!r} is not that of item {item.id!r} in the "
                "store's pool: these are labels of other responses"
            )
    offset = int(pool.response_offsets[position])
    return [offset + n for n in pair]


def _by_texts(record: Mapping[str, Any], finder: PairFinder) -> list[int] | None:
    """Return the rows with a line's prompt and responses; None if it lacks them or none match."""
    prompt, responses = record.get("prompt"), record.get("responses")
    if not isinstance(responses, list) or len(responses) != 2:
        return None
    if not isinstance(prompt, (str, list)):
        return None
    return finder.rows(str(record["id"]), prompt, responses, record.get(ITEM_TEMPLATE_FIELD))

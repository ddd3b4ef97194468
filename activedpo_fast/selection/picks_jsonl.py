"""Picks, and the only writer and reader of their JSONL lines."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activedpo_fast._checks import is_count
from activedpo_fast._files import FilePath, check_characters
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.files import jsonl_rows
from activedpo_fast.pool.template import check_template_kwargs
from activedpo_fast.pool.texts import Text, is_text

_FIELDS = ("id", "pair", "score", "rank", "prompt", "responses")
ITEM_TEMPLATE_FIELD = "item_chat_template_kwargs"
_TEMPLATE_FIELDS = ("chat_template_kwargs", ITEM_TEMPLATE_FIELD)


@dataclass(frozen=True)
class Pick:
    """One pair of responses to label.

    Attributes:
        id: the item's id in the pool.
        pair: positions (i, j) of the two responses in the item's `responses`.
        score: the strategy's score; for `activedpo` the gain phi^T V^-1 phi at the pick.
        rank: 0 for the first pick.
        prompt: the item's prompt.
        responses: the two responses, in the order of `pair`.
        chat_template_kwargs: chat template arguments that the pair was scored with; None for none.
        item_chat_template_kwargs: those of them that come from the item's own column.

    Examples:
        >>> from activedpo_fast import Pick
        >>> best: Pick = picked[0]
        >>> best.rank
        0
        >>> item = pool[pool.position(best.id)]
        >>> best.responses == tuple(item.responses[n] for n in best.pair)
        True
    """

    id: str
    pair: tuple[int, int]
    score: float
    rank: int
    prompt: Text
    responses: tuple[Text, Text]
    chat_template_kwargs: dict[str, Any] | None = field(default=None, hash=False)
    item_chat_template_kwargs: dict[str, Any] | None = field(default=None, hash=False)


def pick_line(pick: Pick, *, template: bool = True, **more: Any) -> str:
    """Return the line of a pick; `more` are extra fields. Template fields only if there are any."""
    record = {
        "id": pick.id,
        "pair": list(pick.pair),
        "score": pick.score,
        "rank": pick.rank,
        "prompt": pick.prompt,
        "responses": list(pick.responses),
        **(_template_fields(pick) if template else {}),
        **more,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_picks(path: FilePath) -> list[tuple[str, Pick, dict[str, Any]]]:
    """Return (place in the file, pick, whole record) for every line, in file order."""
    found: list[tuple[str, Pick, dict[str, Any]]] = []
    seen: dict[str, int] = {}
    for place, record in jsonl_rows(Path(path)):
        check_characters(record, place)
        number = int(place.rpartition(" ")[2])
        pick = _parse_pick(record, place)
        # The same id and pair with other responses is another round's pick, not a duplicate.
        key = json.dumps([pick.id, pick.pair, pick.prompt, pick.responses], sort_keys=True)
        if key in seen:
            raise ActiveDPOError(
                f"{place}: pair {list(pick.pair)} of id {pick.id!r} is already on line {seen[key]}"
            )
        seen[key] = number
        found.append((place, pick, record))
    return found


def _template_fields(pick: Pick) -> dict[str, Any]:
    """Return the chat template fields of a pick's JSONL line; empty if there are none."""
    values = {name: getattr(pick, name) for name in _TEMPLATE_FIELDS}
    return {name: value for name, value in values.items() if value}


def _parse_pick(record: Any, place: str) -> Pick:
    if not isinstance(record, dict):
        raise ActiveDPOError(f"{place}: not a JSON object")
    missing = [field for field in _FIELDS if field not in record]
    if missing:
        raise ActiveDPOError(f"{place}: no {', '.join(repr(field) for field in missing)}")
    if not isinstance(record["id"], str):
        raise ActiveDPOError(f"{place}: 'id' must be a string")
    pair = record["pair"]
    if not (
        isinstance(pair, list)
        and len(pair) == 2
        and all(is_count(i) for i in pair)
        and pair[0] != pair[1]
    ):
        raise ActiveDPOError(f"{place}: 'pair' must be two different response numbers")
    score = record["score"]
    # A JSON integer may be too large for a float; only the comparison is safe.
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < 1e308:
        raise ActiveDPOError(f"{place}: 'score' must be a finite number")
    if not is_count(record["rank"]):
        raise ActiveDPOError(f"{place}: 'rank' must be an integer from 0")
    prompt, responses = record["prompt"], record["responses"]
    if not is_text(prompt):
        raise ActiveDPOError(f"{place}: 'prompt' must be a string or a list of chat messages")
    if not (
        isinstance(responses, list)
        and len(responses) == 2
        and all(is_text(r) and isinstance(r, str) == isinstance(prompt, str) for r in responses)
    ):
        raise ActiveDPOError(
            f"{place}: 'responses' must be two texts of the prompt's kind (string or messages)"
        )
    for name in _TEMPLATE_FIELDS:
        check_template_kwargs(record.get(name), f"{place}: {name!r}")
    return Pick(
        record["id"],
        (pair[0], pair[1]),
        float(score),
        record["rank"],
        prompt,
        (responses[0], responses[1]),
        *map(record.get, _TEMPLATE_FIELDS),
    )

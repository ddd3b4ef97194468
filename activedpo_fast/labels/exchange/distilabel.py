"""distilabel: rows with `instruction` and `generations`; back with `ratings`.

Format: distilabel 1.5.3: the columns of the task UltraFeedback (steps/tasks/ultrafeedback.py). Its
output adds `ratings`, `rationales` and `model_name`. Other raters with these columns work too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from activedpo_fast.labels.exchange.answers import Answer, Found, Problem, as_labeler
from activedpo_fast.labels.exchange.reading import read_rows
from activedpo_fast.labels.exchange.shown import ShownPick, json_text

_ID = "activedpo_id"


def export(picks: Sequence[ShownPick]) -> dict[str, str]:
    """Return the JSONL file of the rows."""
    rows = (
        {
            _ID: pick.record_id,
            "instruction": pick.prompt,
            "generations": [pick.left, pick.right],
            **pick.identity(),
        }
        for pick in picks
    )
    return {"": "".join(json_text(row) for row in rows)}


def answers(path: Path, labeler: str) -> Found:
    """Yield the answers of rated rows: the higher rating is better, equal ratings are a tie.

    Rows without ratings, or with null ratings (the rater failed), have no answer.
    """
    for place, row in read_rows(path):
        ratings = row.get("ratings")
        if ratings is None or (
            isinstance(ratings, list) and not any(r is not None for r in ratings)
        ):
            continue
        yield _answer(row, ratings, place, labeler)


def _answer(row: Mapping[str, Any], ratings: Any, place: str, labeler: str) -> Answer | Problem:
    texts = row.get("generations")
    if not isinstance(texts, list) or len(texts) != 2:
        return Problem(place, "'generations' must be two texts", dict(row))
    if not isinstance(ratings, list) or len(ratings) != 2 or not all(map(_is_rating, ratings)):
        return Problem(place, "'ratings' must be two numbers", dict(row))
    left, right = ratings
    return Answer(
        place=place,
        record_id=str(row.get(_ID)),
        choice="tie" if left == right else "left" if left > right else "right",
        labeler=as_labeler(row.get("model_name"), labeler),
        record=dict(row),
        prompt=row.get("instruction"),
        left=texts[0],
        right=texts[1],
        identity=row,
        comment=_rationales(row.get("rationales")),
    )


def _is_rating(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _rationales(value: Any) -> str | None:
    """Return what the rater said of the two sides, as one comment."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    sides = zip(("left", "right"), value, strict=True)
    return "\n".join(f"{side}: {text}" for side, text in sides if isinstance(text, str)) or None

"""The row that plain CSV and JSONL share: one for each pair, "choice" is filled in by people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from activedpo_fast.labels.exchange.answers import (
    Answer,
    as_labeler,
    as_seconds,
    as_strength,
    as_text,
    short,
)
from activedpo_fast.labels.exchange.shown import ShownPick

# To fill in: choice is left, right, tie or skip; the others are optional.
_TO_FILL_IN = ("choice", "labeler", "comment", "strength", "seconds")


def row_of(pick: ShownPick) -> dict[str, str | int | None]:
    """Return the exported row of a pick."""
    return {
        "id": pick.record_id,
        "prompt": pick.prompt,
        "left": pick.left,
        "right": pick.right,
        **dict.fromkeys(_TO_FILL_IN),
        **pick.identity(),
    }


def answer_of(row: Mapping[str, Any], place: str, labeler: str) -> Answer | None:
    """Return a row's answer; None if it has none yet. A missing column is no text to compare."""
    choice = row.get("choice")
    if choice is None or (isinstance(choice, str) and not choice.strip()):
        return None
    return Answer(
        place=place,
        record_id=str(row.get("id")),
        choice=choice.strip().lower() if isinstance(choice, str) else short(choice),
        labeler=as_labeler(row.get("labeler"), labeler),
        record=dict(row),
        prompt=row.get("prompt"),
        left=row.get("left"),
        right=row.get("right"),
        identity=row,
        seconds=as_seconds(row.get("seconds")),
        comment=as_text(row.get("comment")),
        strength=as_strength(row.get("strength")),
    )

"""Plain JSONL: one object per pair, with "choice" to fill in. The format is this module's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from activedpo_fast.labels.exchange.answers import Found
from activedpo_fast.labels.exchange.reading import read_rows
from activedpo_fast.labels.exchange.rows import answer_of, row_of
from activedpo_fast.labels.exchange.shown import ShownPick, json_text


def export(picks: Sequence[ShownPick]) -> dict[str, str]:
    """Return the file: `rows.row_of` of every pick, one a line."""
    return {"": "".join(json_text(row_of(pick)) for pick in picks)}


def answers(path: Path, labeler: str) -> Found:
    """Yield the answers of the lines whose "choice" was filled in."""
    for place, row in read_rows(path):
        answer = answer_of(row, place, labeler)
        if answer is not None:
            yield answer

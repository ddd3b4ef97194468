"""Argilla: a data set's settings and records out; its records back.

Format: argilla 2.8.0 (the Python SDK): `settings.json` as `rg.Settings.from_json` reads it,
`records.json` as `Dataset.records.from_json` does, and back what
`Dataset.records.to_list(flatten=True)` gives. Only the flattened form has the status of each
response: the nested one, which `records.to_json` writes, does not tell drafts from answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.exchange.answers import (
    CHOICES,
    Answer,
    Found,
    Problem,
    as_labeler,
    as_strength,
    as_text,
    short,
)
from activedpo_fast.labels.exchange.reading import read_json_list
from activedpo_fast.labels.exchange.shown import ShownPick, json_text

_TEXTS = ("prompt", "left", "right")
_STRENGTHS = (1, 2, 3)


def export(picks: Sequence[ShownPick]) -> dict[str, str]:
    """Return the files `settings.json` and `records.json`."""
    records = [
        {
            "id": pick.record_id,
            "fields": {name: getattr(pick, name) for name in _TEXTS},
            "metadata": pick.identity(),
        }
        for pick in picks
    ]
    return {
        "settings.json": json_text(_settings(), indent=1),
        "records.json": json_text(records, indent=1),
    }


def answers(path: Path, labeler: str) -> Found:
    """Yield the answers of a list of flattened records; drafts are left out."""
    for place, record in read_json_list(path, "record"):
        if "responses" in record and "fields" in record:
            if record["responses"]:
                raise ActiveDPOError(
                    f"{place}: the status of its responses is missing: write "
                    "dataset.records.to_list(flatten=True) to the file"
                )
            continue
        yield from _of_record(record, place, labeler)


def _settings() -> dict[str, Any]:
    fields = [
        {
            "name": name,
            "title": name.capitalize(),
            "required": True,
            "settings": {"type": "text", "use_markdown": False},
        }
        for name in _TEXTS
    ]
    choices = [{"value": choice, "text": choice.capitalize()} for choice in CHOICES]
    questions = [
        {
            "name": "better",
            "title": "Which response is better?",
            "required": True,
            "settings": {
                "type": "label_selection",
                "options": choices,
                "visible_options": len(choices),
            },
        },
        {
            "name": "strength",
            "title": "How much better?",
            "required": False,
            "settings": {"type": "rating", "options": [{"value": n} for n in _STRENGTHS]},
        },
        {
            "name": "comment",
            "title": "Comment",
            "required": False,
            "settings": {"type": "text", "use_markdown": False},
        },
    ]
    return {
        "guidelines": "Choose the better response. Tie: both are equally good. Skip: no answer.",
        "fields": fields,
        "questions": questions,
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "mapping": None,
    }


def _of_record(record: Mapping[str, Any], place: str, labeler: str) -> Found:
    users: dict[str, dict[str, Any]] = {}
    for question in ("better", "strength", "comment"):
        for user, status, value in _responses(record, question, place):
            mine = users.setdefault(as_labeler(user, labeler), {"twice": False})
            mine["twice"] |= question in mine
            mine[question], mine["status"] = value, status
    for user, mine in users.items():
        where = f"{place}, user {short(user)}"
        if mine["twice"]:
            yield Problem(where, "the user has two responses to one question", dict(record))
            continue
        if mine["status"] == "draft":
            continue
        # A record that was discarded has no label, whatever was chosen before.
        choice = "skip" if mine["status"] == "discarded" else mine.get("better")
        if not isinstance(choice, str):
            yield Problem(where, "the response has no answer to 'better'", dict(record))
            continue
        yield Answer(
            place=where,
            record_id=str(record.get("id")),
            choice=choice,
            labeler=user,
            record=dict(record),
            prompt=record.get("prompt"),
            left=record.get("left"),
            right=record.get("right"),
            identity=record,
            comment=as_text(mine.get("comment")),
            strength=as_strength(mine.get("strength")),
        )


def _responses(record: Mapping[str, Any], question: str, place: str) -> list[tuple[Any, Any, Any]]:
    """Return (user, status, value) of every response to a question."""
    name = f"{question}.responses"
    # to_list fills what only other records have with null.
    columns = [record.get(key) or [] for key in (f"{name}.users", f"{name}.status", name)]
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        raise ActiveDPOError(
            f"{place}: {name!r}, '{name}.users' and '{name}.status' must be lists of one length"
        )
    unknown = [status for status in columns[1] if status not in ("submitted", "discarded", "draft")]
    if unknown:
        raise ActiveDPOError(
            f"{place}: '{name}.status' has {short(unknown[0])}, which is no status"
        )
    return list(zip(*columns, strict=True))

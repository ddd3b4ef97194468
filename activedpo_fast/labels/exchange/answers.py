"""What annotation tools give back, before it is matched to picks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

CHOICES = ("left", "right", "tie", "skip")


@dataclass(frozen=True)
class Answer:
    """One answer of one labeler.

    Attributes:
        place: where it was found, for messages.
        record_id: the exported id that came back with it, unchecked.
        choice: one of `CHOICES`; the sides are those that the labeler saw.
        labeler: who answered.
        record: what the tool gave back, for the file of answers set aside.
        prompt, left, right: the texts that came back; None if the tool does not return them.
        identity: those of `ShownPick.identity()`'s fields that came back.
        seconds: time that the answer took.
        comment: the labeler's remark.
        strength: how much better the chosen response is, from 1.
    """

    place: str
    record_id: str
    choice: str
    labeler: str
    record: Any
    prompt: str | None = None
    left: str | None = None
    right: str | None = None
    identity: Mapping[str, Any] | None = None
    seconds: float | None = None
    comment: str | None = None
    strength: int | None = None


@dataclass(frozen=True)
class Problem:
    """An answer that cannot be used, and why."""

    place: str
    reason: str
    record: Any


Found = Iterator[Answer | Problem]


def short(value: object) -> str:
    """Return a value for a message: one line, escaped, not too long."""
    try:
        shown = repr(value)
    except RecursionError:
        shown = "a deeply nested value"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def as_text(value: Any) -> str | None:
    """Return a text that is not blank, or None."""
    return value if isinstance(value, str) and value.strip() else None


def as_seconds(value: Any) -> float | None:
    """Return a finite time from 0, also from a cell of a table, or None."""
    number = _as_number(value)
    return number if number is not None and number >= 0 else None


def as_strength(value: Any) -> int | None:
    """Return an integer from 1, also from a cell of a table, or None."""
    number = _as_number(value)
    return int(number) if number is not None and number >= 1 and number == int(number) else None


def as_labeler(value: Any, default: str) -> str:
    """Return a labeler's name: a text or a number of an account; `default` if there is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return as_text(value) or default


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None

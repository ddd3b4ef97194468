"""The answers that stand, from the entries of a journal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.combine import TIE, Label, Votes
from activedpo_fast.labels.reading import SKIP


@dataclass(frozen=True)
class Answer:
    """A labeler's answer to a pair.

    Attributes:
        pair: the number of the pair in the batch, from 0.
        labeler: who gave it.
        label: 0 or 1, the position in `responses` of the better one, "tie" or "skip".
        left: the position in `responses` of the one that was shown on the left.
        seconds: for how long the pair was in sight.
        time: when, in UTC (ISO 8601).
        strength: how much better, 1 (slightly) to 3 (much); None if the labeler did not say.
        comment: free text, often empty.
    """

    pair: int
    labeler: str
    label: Label
    left: int
    seconds: float
    time: str
    strength: int | None = None
    comment: str = ""

    def entry(self) -> dict[str, Any]:
        return {"kind": "answer", **asdict(self)}


def head_entry(pairs: str, seed: int, overlap: float) -> dict[str, Any]:
    """Return the first entry of a journal: a hash of the pairs, and what all labelers share."""
    return {"kind": "batch", "format": 1, "pairs": pairs, "seed": seed, "overlap": overlap}


def shown_entry(pair: int, labeler: str) -> dict[str, Any]:
    """Return the entry that a labeler now looks at a pair, so that others get another one."""
    return {"kind": "shown", "pair": pair, "labeler": labeler, "time": now().isoformat()}


def undo_entry(pair: int, labeler: str) -> dict[str, Any]:
    return {"kind": "undo", "pair": pair, "labeler": labeler, "time": now().isoformat()}


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


class Answers:
    """What a journal says: apply its entries in order.

    Args:
        pairs: number of pairs in the batch.

    Attributes:
        head: the first entry; None before there is one.
        shown: for each labeler the pair that they looked at last, and since when.
    """

    def __init__(self, pairs: int) -> None:
        self._pairs = pairs
        self.head: dict[str, Any] | None = None
        self.shown: dict[str, tuple[int, datetime]] = {}
        self._standing: dict[tuple[str, int], Answer] = {}  # in the order they were given
        self._labelers: dict[int, set[str]] = {}  # by pair

    def apply(self, entry: dict[str, Any], place: object) -> None:
        """Take one entry into account.

        Raises:
            ActiveDPOError: an entry that this page does not write; names `place`.
        """
        try:
            self._apply(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ActiveDPOError(
                f"{place}: an entry that is not understood ({type(error).__name__}: {error}): put "
                "the file back as it was, or choose another --output"
            ) from None

    def _apply(self, entry: dict[str, Any]) -> None:
        kind = entry["kind"]
        content = {name: value for name, value in entry.items() if name != "kind"}
        if (kind == "batch") != (self.head is None):
            raise ValueError("the first entry has to say which pairs the others are about")
        if kind == "batch":
            _check_head(entry)
            self.head = entry
            return
        _check_pair(entry["pair"], self._pairs)
        _check_name(entry["labeler"])
        if kind == "answer":
            answer = Answer(**content)
            _check_answer(answer)
            self._standing[answer.labeler, answer.pair] = answer
            self._labelers.setdefault(answer.pair, set()).add(answer.labeler)
        elif kind == "shown":
            self.shown[entry["labeler"]] = (entry["pair"], _time(entry["time"]))
        elif kind == "undo":
            del self._standing[entry["labeler"], entry["pair"]]
            self._labelers[entry["pair"]].discard(entry["labeler"])
        else:
            raise ValueError(f"kind {kind!r}")

    def all(self) -> list[Answer]:
        """Return the answers that stand, oldest first."""
        return list(self._standing.values())

    def by(self, labeler: str) -> list[Answer]:
        """Return those of one labeler, oldest first."""
        return [answer for answer in self._standing.values() if answer.labeler == labeler]

    def of(self, labeler: str, pair: int) -> Answer | None:
        return self._standing.get((labeler, pair))

    def labelers_of(self, pair: int) -> set[str]:
        """Return who has answered a pair."""
        return self._labelers.get(pair, set())

    def votes(self) -> Sequence[Votes]:
        """Return for each pair of the batch its labels by labeler."""
        found: list[dict[str, Label]] = [{} for _ in range(self._pairs)]
        for answer in self._standing.values():
            found[answer.pair][answer.labeler] = answer.label
        return found


def public_fields(answer: Answer) -> dict[str, Any]:
    """Return what the labels file says about an answer; fields without content are left out."""
    values = {field.name: getattr(answer, field.name) for field in fields(answer)}
    del values["pair"]
    return {name: value for name, value in values.items() if value not in (None, "")}


# A journal may have been edited. What is wrong in it must not become a label of another pair.


def _check_head(entry: dict[str, Any]) -> None:
    if entry["format"] != 1:
        raise ValueError(f"format {entry['format']}")
    if not isinstance(entry["pairs"], str):
        raise ValueError(f"pairs {entry['pairs']!r}")
    if type(entry["seed"]) is not int:
        raise ValueError(f"seed {entry['seed']!r}")
    if not (_is_number(entry["overlap"]) and 0 <= entry["overlap"] <= 100):
        raise ValueError(f"overlap {entry['overlap']!r}")


def _check_pair(pair: Any, pairs: int) -> None:
    if type(pair) is not int or not 0 <= pair < pairs:
        raise ValueError(f"pair {pair!r} of {pairs}")


def _check_name(labeler: Any) -> None:
    if not isinstance(labeler, str) or not labeler.strip() or not labeler.isprintable():
        raise ValueError(f"labeler {labeler!r}")


def _check_answer(answer: Answer) -> None:
    _time(answer.time)
    known = {
        "label": answer.label in (TIE, SKIP) or _is_position(answer.label),
        "left": _is_position(answer.left),
        "seconds": _is_number(answer.seconds) and answer.seconds >= 0,
        "strength": answer.strength is None
        or (type(answer.strength) is int and answer.strength in (1, 2, 3)),
        "comment": isinstance(answer.comment, str),
    }
    for name, right in known.items():
        if not right:
            raise ValueError(f"{name} {getattr(answer, name)!r}")


def _is_position(value: Any) -> bool:
    return type(value) is int and value in (0, 1)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _time(value: Any) -> datetime:
    time = datetime.fromisoformat(value)
    if time.tzinfo is None:
        raise ValueError(f"time {value!r} without a time zone")
    return time

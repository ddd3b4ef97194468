"""The answer of a selection: which pairs to label, as a file for people and a dataset for DPO."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from activedpo_fast._files import reason_of, write_atomic
from activedpo_fast.data import PoolItem, PreferencePool, Text
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.template import COLUMN, check_template_kwargs

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

SKIP = "skip"
NO_PREFERENCE = (SKIP, "tie")
LABELS = '0, 1, "skip", "tie" or null (not labeled yet)'

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
        chat_template_kwargs: arguments of the chat template that the pair was scored with; None for
            none.
        item_chat_template_kwargs: those among them that the item has in a column of its own.
    """

    id: str
    pair: tuple[int, int]
    score: float
    rank: int
    prompt: Text
    responses: tuple[Text, Text]
    chat_template_kwargs: dict[str, Any] | None = field(default=None, hash=False)
    item_chat_template_kwargs: dict[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Selection(Sequence[Pick]):
    """The picks of one call, best first, and the name of the strategy that made them."""

    picks: tuple[Pick, ...]
    strategy: str

    def __len__(self) -> int:
        return len(self.picks)

    @overload
    def __getitem__(self, index: int) -> Pick: ...
    @overload
    def __getitem__(self, index: slice) -> Selection: ...
    def __getitem__(self, index: int | slice) -> Pick | Selection:
        if isinstance(index, slice):
            return Selection(self.picks[index], self.strategy)
        return self.picks[index]

    def __iter__(self) -> Iterator[Pick]:
        return iter(self.picks)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one line a pick: id, pair, score, rank, prompt, responses. Whole or not at all.

        Picks that have them also get `chat_template_kwargs` and `item_chat_template_kwargs`.
        People add `"label"` to a line: 0 or 1, the position in `responses` of the one that they
        prefer, or "skip" (or "tie") for no preference. A line without a label, or with null, is not
        labeled yet. `read_labels` reads the file back.

        Raises:
            ActiveDPOError: a score that is not finite (JSON has no such number).
        """
        lines = []
        for pick in self.picks:
            if not math.isfinite(pick.score):
                raise ActiveDPOError(f"pick {pick.rank} (id {pick.id!r}): score is {pick.score}")
            record = {"id": pick.id, "pair": list(pick.pair), "score": pick.score,
                      "rank": pick.rank, "prompt": pick.prompt, "responses": list(pick.responses),
                      **template_fields(pick)}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_atomic(path, "".join(lines))

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], *, strategy: str = "unknown") -> Selection:
        """Read a file of `to_jsonl`. Labels and other added columns are left aside.

        The lines do not say which strategy made them; pass `strategy` if it matters.

        Raises:
            ActiveDPOError: naming the first line at fault (not JSON, a field missing or of the
                wrong type, the same pair twice).
        """
        return cls(tuple(pick for _, pick, _ in read_picks(path)), strategy)

    def to_dataset(self, labels: Sequence[int | None]) -> datasets.Dataset:
        """The labelled pairs as `trl.DPOTrainer` reads them: id, prompt, chosen, rejected.

        Where picks have arguments of the chat template there is also `chat_template_kwargs`, so
        that the trainer's tokens are those that were scored.

        Args:
            labels: one a pick; 0 or 1, the position in `pick.responses` of the preferred response,
                or None for no preference: that pick is left out. (In a file, no preference is
                "skip" or "tie"; see `read_labels`.)

        Raises:
            ActiveDPOError: a wrong number of labels, or another value (booleans too), or plain
                strings and chat messages in one selection.
        """
        import datasets  # slow to import, and needed only here

        if len(labels) != len(self.picks):
            raise ActiveDPOError(f"{len(labels)} labels for {len(self.picks)} picks")
        columns: dict[str, list[Any]] = {"id": [], "prompt": [], "chosen": [], "rejected": []}
        arguments: list[dict[str, Any]] = []
        for position, (pick, label) in enumerate(zip(self.picks, labels, strict=True)):
            preferred = check_label(label, f"label {position} (id {pick.id!r})")
            if isinstance(pick.prompt, str) != isinstance(self.picks[0].prompt, str):
                raise ActiveDPOError(
                    f"pick {position} (id {pick.id!r}): plain strings and chat messages are mixed"
                )
            if preferred is not None:
                columns["id"].append(pick.id)
                columns["prompt"].append(pick.prompt)
                columns["chosen"].append(pick.responses[preferred])
                columns["rejected"].append(pick.responses[1 - preferred])
                arguments.append(pick.chat_template_kwargs or {})
        if any(arguments):
            columns[COLUMN] = arguments
        features = None
        if not columns["id"]:  # nothing to infer the column types from
            string = datasets.Value("string")
            features = datasets.Features({name: string for name in columns})
        elif as_json := _json_features(columns):
            rest = {name: values for name, values in columns.items() if name not in as_json}
            types = {**datasets.Dataset.from_dict(rest).features, **as_json}
            features = datasets.Features({name: types[name] for name in columns})
        return datasets.Dataset.from_dict(columns, features=features)

    def as_pool(self) -> PreferencePool:
        """A pool with one two-response item a pick, in order, for the features of the history.

        The same prompt may have been picked more than once, and ids of a pool are unique, so the
        item of pick number p has the id `"<id>#<p>"`.
        """
        return PreferencePool(
            PoolItem(id=f"{pick.id}#{position}", prompt=pick.prompt, responses=pick.responses,
                     extra={COLUMN: pick.item_chat_template_kwargs}
                     if pick.item_chat_template_kwargs else {})
            for position, pick in enumerate(self.picks)
        )


def read_labels(
    path: str | os.PathLike[str], *, strategy: str = "unknown", all_answered: bool = False
) -> tuple[Selection, list[int | None]]:
    """Read a `to_jsonl` file to whose lines people added `"label"`: 0, 1, "skip" or "tie".

    Lines may be reordered or left out. Those without a label, or with null, are not labeled yet:
    they are left out (`read_pending` has them), and the log says how many.

    Args:
        all_answered: the file is one whose lines have all been answered, where null is an older
            version's way to write "skip"; it is read so, and the log says that.

    Returns:
        The picks that are labeled and one label each, as `to_dataset` takes them: None for "skip"
        and "tie".

    Raises:
        ActiveDPOError: naming the first line at fault, as `Selection.from_jsonl`, and for another
            label; no line has a label.
    """
    records = [(pick, read_label(record, place)) for place, pick, record in read_picks(path)]
    missing = sum(label is None for _, label in records)
    if missing and all_answered:
        logger.info("%s: %d labels are null, which is read as \"skip\" (no preference), as earlier "
                    "versions wrote it", path, missing)
    elif missing == len(records) > 0:
        raise ActiveDPOError(f"{path}: none of its {missing} lines has a 'label' yet: set it to 0 "
                             "or 1 (the better of 'responses') or \"skip\"")
    elif missing:
        logger.info("%s: %d of %d pairs have no label yet and are left out", path, missing,
                    len(records))
        records = [(pick, label) for pick, label in records if label is not None]
    return (Selection(tuple(pick for pick, _ in records), strategy),
            [label if isinstance(label, int) else None for _, label in records])


def read_pending(path: str | os.PathLike[str], *, strategy: str = "unknown") -> Selection:
    """The picks of a `to_jsonl` file that are not labeled yet: without `"label"`, or with null.

    Pass them to `ActiveDPOSelector.select` as `asked`, and they are not picked again.

    Raises:
        ActiveDPOError: as `read_labels`, except that there may be no label at all.
    """
    records = [(pick, read_label(record, place)) for place, pick, record in read_picks(path)]
    return Selection(tuple(pick for pick, label in records if label is None), strategy)


def read_label(record: Mapping[str, Any], place: str) -> int | str | None:
    """The `label` of a line: 0, 1, `SKIP` for no preference, None where it is not labeled yet.

    Raises:
        ActiveDPOError: anything else, naming `place`.
    """
    label = record.get("label")
    if isinstance(label, str) and label in NO_PREFERENCE:
        return SKIP
    # Tables write 1.0 where other lines have null.
    if isinstance(label, float) and label in (0.0, 1.0):
        return int(label)
    if label is None or (type(label) is int and label in (0, 1)):
        return label
    raise ActiveDPOError(f"{place}: 'label' must be {LABELS}, not {label!r}")


def by_preference(
    selection: Selection, labels: Sequence[int | None]
) -> tuple[Selection, Selection]:
    """The picks with a preference (a label 0 or 1), and those without (None).

    `ActiveDPOSelector.select` takes the former as `labelled` and the latter as `asked`.
    """
    pairs = list(zip(selection, labels, strict=True))
    return (Selection(tuple(pick for pick, label in pairs if label is not None),
                      selection.strategy),
            Selection(tuple(pick for pick, label in pairs if label is None), selection.strategy))


def read_picks(path: str | os.PathLike[str]) -> list[tuple[str, Pick, dict[str, Any]]]:
    """(place in the file, pick, whole record) of every line, in the file's order."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors add a byte order mark
    except OSError as error:
        raise ActiveDPOError(f"{path}: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise ActiveDPOError(f"{path}: not UTF-8 text ({error.reason})") from error
    found: list[tuple[str, Pick, dict[str, Any]]] = []
    seen: dict[str, int] = {}
    # split("\n"), not splitlines(): a JSON string may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ActiveDPOError(f"{place}: broken JSON: {error}") from error
        pick = _parse_pick(record, place)
        # The same id and pair with other responses is another round's pick, and not a duplicate.
        key = json.dumps([pick.id, pick.pair, pick.prompt, pick.responses], sort_keys=True)
        if key in seen:
            raise ActiveDPOError(f"{place}: pair {list(pick.pair)} of id {pick.id!r} is already on "
                                 f"line {seen[key]}")
        seen[key] = number
        found.append((place, pick, record))
    return found


def _parse_pick(record: Any, place: str) -> Pick:
    if not isinstance(record, dict):
        raise ActiveDPOError(f"{place}: not a JSON object")
    missing = [field for field in _FIELDS if field not in record]
    if missing:
        raise ActiveDPOError(f"{place}: no {', '.join(repr(field) for field in missing)}")
    if not isinstance(record["id"], str):
        raise ActiveDPOError(f"{place}: 'id' must be a string")
    pair = record["pair"]
    if not (isinstance(pair, list) and len(pair) == 2 and all(_is_count(i) for i in pair)
            and pair[0] != pair[1]):
        raise ActiveDPOError(f"{place}: 'pair' must be two different response numbers")
    score = record["score"]
    # An integer of JSON may be too large for a float; only the comparison is safe.
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < 1e308:
        raise ActiveDPOError(f"{place}: 'score' must be a finite number")
    if not _is_count(record["rank"]):
        raise ActiveDPOError(f"{place}: 'rank' must be an integer from 0")
    prompt, responses = record["prompt"], record["responses"]
    if not _is_text(prompt):
        raise ActiveDPOError(f"{place}: 'prompt' must be a string or a list of chat messages")
    if not (isinstance(responses, list) and len(responses) == 2
            and all(_is_text(r) and isinstance(r, str) == isinstance(prompt, str)
                    for r in responses)):
        raise ActiveDPOError(
            f"{place}: 'responses' must be two texts of the prompt's kind (string or messages)"
        )
    for name in _TEMPLATE_FIELDS:
        check_template_kwargs(record.get(name), f"{place}: {name!r}")
    return Pick(record["id"], (pair[0], pair[1]), float(score), record["rank"], prompt,
                (responses[0], responses[1]), *map(record.get, _TEMPLATE_FIELDS))


def template_fields(pick: Pick) -> dict[str, Any]:
    """What a line of JSONL says about the pick's chat template; empty where there is nothing."""
    values = {name: getattr(pick, name) for name in _TEMPLATE_FIELDS}
    return {name: value for name, value in values.items() if value}


def _json_features(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """Types for the columns whose objects have unlike keys.

    As a table of Arrow, each object would have all keys, those that it lacks as null, which a
    template can tell from a key that is not there.
    """
    import datasets

    found: dict[str, Any] = {}
    for name in ("prompt", "chosen", "rejected"):
        keys = {frozenset(message) for text in columns[name] if not isinstance(text, str)
                for message in text}
        if len(keys) > 1:
            found[name] = datasets.List(datasets.Json())
    if COLUMN in columns:
        found[COLUMN] = datasets.Json()
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )


def check_label(label: Any, place: str) -> int | None:
    if label is None:
        return None
    # `True == 1`: a column of booleans must not pass for preferences. Integral lets numpy's in.
    if isinstance(label, Integral) and not isinstance(label, bool) and label in (0, 1):
        return int(label)
    raise ActiveDPOError(f"{place} must be 0, 1 or null (None), not {label!r}")

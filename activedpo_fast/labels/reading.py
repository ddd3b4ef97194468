"""Labels in a file of picks: the picks that people have labeled, and those still pending."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from activedpo_fast._files import FilePath
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.picks_jsonl import read_picks
from activedpo_fast.selection.result import Selection, check_labels

logger = logging.getLogger(__name__)

SKIP = "skip"
NO_PREFERENCE = (SKIP, "tie")
LABELS = '0, 1, "skip", "tie" or null (not labeled yet)'


def read_labels(
    path: FilePath, *, strategy: str = "unknown", all_answered: bool = False
) -> tuple[Selection, list[int | None]]:
    """Read a `to_jsonl` file in which people added `"label"` to each line: 0, 1, "skip" or "tie".

    Lines may be reordered or left out. Those without a label, or with null, are not labeled yet:
    they are left out (`read_pending` returns them), and their number is logged.

    Args:
        all_answered: all lines of the file have been answered. Older versions wrote null for
            "skip"; it is then read as "skip", and this is logged.

    Returns:
        The labeled picks and one label for each, as input for `to_dataset`: None for "skip" and
        "tie".

    Raises:
        ActiveDPOError: as `Selection.from_jsonl`, or an invalid label, naming the first line at
            fault; no line has a label.

    Examples:
        >>> from activedpo_fast import read_labels
        >>> answered, labels = read_labels("to_label.jsonl")
        >>> labels
        [0, 1, None]
        >>> train_dataset = answered.to_dataset(labels)
        >>> len(train_dataset)
        2
    """
    records = [(pick, read_label(record, place)) for place, pick, record in read_picks(path)]
    missing = sum(label is None for _, label in records)
    if missing and all_answered:
        logger.info(
            '%s: %d labels are null, which is read as "skip" (no preference), as earlier '
            "versions wrote it",
            path,
            missing,
        )
    elif missing == len(records) > 0:
        raise ActiveDPOError(
            f"{path}: none of its {missing} lines has a 'label' yet: set it to 0 "
            "or 1 (the better of 'responses') or \"skip\""
        )
    elif missing:
        logger.info(
            "%s: %d of %d pairs have no label yet and are left out", path, missing, len(records)
        )
        records = [(pick, label) for pick, label in records if label is not None]
    return (
        Selection(tuple(pick for pick, _ in records), strategy),
        [label if isinstance(label, int) else None for _, label in records],
    )


def read_pending(path: FilePath, *, strategy: str = "unknown") -> Selection:
    """Return the picks of a `to_jsonl` file that are not labeled yet: no `"label"`, or null.

    Pass them to `ActiveDPOSelector.select` as `asked` so that they are not picked again.

    Raises:
        ActiveDPOError: as `read_labels`, except that there may be no label at all.

    Examples:
        >>> from activedpo_fast import read_pending
        >>> pending = read_pending("to_label.jsonl")
        >>> len(pending)
        1
        >>> following = selector.select(pool, 2, asked=pending)
    """
    records = [(pick, read_label(record, place)) for place, pick, record in read_picks(path)]
    return Selection(tuple(pick for pick, label in records if label is None), strategy)


def read_label(record: Mapping[str, Any], place: str) -> int | str | None:
    """Return the `label` of a line: 0, 1, `SKIP` for no preference, None if not labeled yet.

    Raises:
        ActiveDPOError: anything else, naming `place`.
    """
    label = record.get("label")
    if isinstance(label, str) and label in NO_PREFERENCE:
        return SKIP
    # Tables write 1.0 if other lines have null.
    if isinstance(label, float) and label in (0.0, 1.0):
        return int(label)
    if label is None or (type(label) is int and label in (0, 1)):
        return label
    raise ActiveDPOError(f"{place}: 'label' must be {LABELS}, not {label!r}")


def by_preference(
    selection: Selection, labels: Sequence[int | None]
) -> tuple[Selection, Selection]:
    """Split the picks into those with a preference (a label 0 or 1), and those without (None).

    `ActiveDPOSelector.select` takes the former as `labeled` and the latter as `asked`.

    Raises:
        ActiveDPOError: a wrong number of labels, or any other value.

    Examples:
        >>> from activedpo_fast import by_preference
        >>> with_preference, without = by_preference(picked, labels)
        >>> len(with_preference), len(without)
        (3, 1)
        >>> following = selector.select(pool, 2, labeled=with_preference, asked=without)
    """
    preferred = check_labels(selection, labels)
    pairs = list(zip(selection, preferred, strict=True))
    return (
        Selection(tuple(pick for pick, label in pairs if label is not None), selection.strategy),
        Selection(tuple(pick for pick, label in pairs if label is None), selection.strategy),
    )

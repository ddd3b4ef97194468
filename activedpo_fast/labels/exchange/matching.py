"""Answers to labels: which pick and which response each answer means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.exchange.answers import CHOICES, Answer, Problem, short
from activedpo_fast.labels.exchange.shown import as_shown, pick_key, split_record_id, text_hash
from activedpo_fast.pool.texts import check_string
from activedpo_fast.selection.picks_jsonl import Pick

_LONGEST_NAME = 200


@dataclass(frozen=True)
class Label:
    """One labeler's label of one pick.

    Attributes:
        position: the pick's position in the batch.
        label: 0 or 1, the position in the pick's `responses`, or "tie" or "skip".
        answer: the answer that it comes from.
    """

    position: int
    label: int | str
    answer: Answer


class _Mismatch(Exception):
    """An answer that is not one to a pick; the message is the reason."""


def match(
    found: Iterable[Answer | Problem], picks: Sequence[Pick]
) -> tuple[list[Label], list[Problem]]:
    """Return the labels of the picks, and the answers that are none.

    The response on the left is the one whose text came back as the left one, whatever was
    exported: a tool or a person may have swapped them. Without texts the hashes decide, and
    without hashes the id.

    Not labels: an answer to another pick or with an unknown id; one whose prompt or responses are
    not those of the pick; a labeler's second answer to a pick. If a labeler's answers to a pick
    differ, none of them is a label.
    """
    position = {pick_key(pick): n for n, pick in enumerate(picks)}
    labels: list[Label] = []
    problems: list[Problem] = []
    for one in found:
        if isinstance(one, Problem):
            problems.append(one)
            continue
        try:
            labels.append(_label_of(one, picks, position))
        except _Mismatch as mismatch:
            problems.append(Problem(one.place, str(mismatch), one.record))
    kept, repeated = _once_each(labels, picks)
    return kept, [*problems, *repeated]


def _label_of(answer: Answer, picks: Sequence[Pick], position: Mapping[str, int]) -> Label:
    parts = split_record_id(answer.record_id)
    if parts is None:
        raise _Mismatch(f"the id {short(answer.record_id)} is not one that was exported")
    if parts[0] not in position:
        raise _Mismatch(f"the id {answer.record_id!r} is of a pair that is not in the batch")
    n = position[parts[0]]
    pick = picks[n]
    if answer.choice not in CHOICES:
        raise _Mismatch(f"the answer {short(answer.choice)} is not one of {', '.join(CHOICES)}")
    left = _left_position(answer, pick, parts[1])
    label: int | str = answer.choice
    if answer.choice in ("left", "right"):
        label = left if answer.choice == "left" else 1 - left
    return Label(n, label, replace(answer, labeler=_checked_name(answer)))


def _checked_name(answer: Answer) -> str:
    """Return the labeler's name; a name or a comment that no file can hold is refused."""
    try:
        check_string(answer.labeler, "the labeler's name", "")
        check_string(answer.comment or "", "the comment", "")
    except ActiveDPOError as error:
        raise _Mismatch(str(error).removeprefix(": ")) from error
    if len(answer.labeler) > _LONGEST_NAME:
        raise _Mismatch(f"the labeler's name has more than {_LONGEST_NAME} characters")
    return answer.labeler.strip()


def _left_position(answer: Answer, pick: Pick, exported: int) -> int:
    """Return the position in `pick.responses` of the response that was on the left."""
    name = short(pick.id)
    if answer.prompt is not None and answer.prompt != as_shown(pick.prompt):
        raise _Mismatch(f"the prompt is not that of {name}: its text was changed")
    hashes = [text_hash(response) for response in pick.responses]
    texts = [as_shown(response) for response in pick.responses]
    by_text = _order(answer.left, answer.right, texts, f"the responses are not those of {name}")
    if by_text is not None:
        return by_text
    # Only now: a spreadsheet may have made another number of an id or of a hash.
    identity = answer.identity or {}
    if identity.get("pick_id") not in (None, pick.id):
        raise _Mismatch(f"'pick_id' is {short(identity['pick_id'])}, but the id is that of {name}")
    left, right = identity.get("left_sha256"), identity.get("right_sha256")
    by_hash = _order(left, right, hashes, f"the response hashes are not those of {name}")
    return exported if by_hash is None else by_hash


def _order(left: object, right: object, own: Sequence[str], wrong: str) -> int | None:
    """Return which of the two is on the left; None if that cannot be told from these."""
    if left is None and right is None:
        return None
    if not isinstance(left, str) or not isinstance(right, str):
        raise _Mismatch(f"{wrong}: {short(left)} and {short(right)}")
    if [left, right] == [own[0], own[1]]:
        return None if own[0] == own[1] else 0
    if [left, right] == [own[1], own[0]]:
        return 1
    if left == right:
        raise _Mismatch(f"{wrong}: both sides are the same")
    changed = "left" if left not in own else "right"
    raise _Mismatch(f"{wrong}: the {changed} one was changed")


def _once_each(labels: Sequence[Label], picks: Sequence[Pick]) -> tuple[list[Label], list[Problem]]:
    groups: dict[tuple[int, str], list[Label]] = {}
    for label in labels:
        groups.setdefault((label.position, label.answer.labeler), []).append(label)
    kept: list[Label] = []
    problems: list[Problem] = []
    for (position, labeler), group in groups.items():
        pair = f"pair {list(picks[position].pair)} of id {short(picks[position].id)}"
        first = group[0].answer
        who = f"labeler {short(labeler)}"
        if len({label.label for label in group}) > 1:
            given = ", ".join(repr(label.label) for label in group)
            problems.extend(
                Problem(
                    label.answer.place,
                    f"{who} gave different answers ({given}) to {pair}",
                    label.answer.record,
                )
                for label in group
            )
            continue
        kept.append(group[0])
        problems.extend(
            Problem(
                label.answer.place,
                f"{who} has already answered {pair} ({first.place})",
                label.answer.record,
            )
            for label in group[1:]
        )
    return kept, problems

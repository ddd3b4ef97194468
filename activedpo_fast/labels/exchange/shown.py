"""A pick as an annotation tool shows it: a prompt, two sides, and what brings its label back."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.messages import images_of, message_text
from activedpo_fast.pool.texts import Text, check_string
from activedpo_fast.selection.picks_jsonl import Pick

logger = logging.getLogger(__name__)

# Line separators that some readers of JSONL end a line at, and codes that terminals obey.
_NOT_PLAIN = re.compile("[\x7f-\x9f\u2028\u2029]")
_RECORD_ID = re.compile(r"([0-9a-f]{16})-(01|10)")


@dataclass(frozen=True)
class ShownPick:
    """A pick, and which of its responses is on which side.

    Attributes:
        pick: the pick.
        order: positions in `pick.responses` of the response on the left and of that on the right.
        seed: the seed that chose the sides; None if they were left as they are.
    """

    pick: Pick
    order: tuple[int, int]
    seed: int | None

    @property
    def record_id(self) -> str:
        """The exported id: a hash of the pick (64 bits) and the order of its sides.

        Ids of a pool may be any text. This one is safe as an id, a file name or a cell, and says
        what is on the left even in tools that give back nothing else.
        """
        return f"{pick_key(self.pick)}-{self.order[0]}{self.order[1]}"

    @property
    def prompt(self) -> str:
        return as_shown(self.pick.prompt)

    @property
    def left(self) -> str:
        return as_shown(self.pick.responses[self.order[0]])

    @property
    def right(self) -> str:
        return as_shown(self.pick.responses[self.order[1]])

    def identity(self) -> dict[str, str | int]:
        """Return the fields that every exported record has besides its id and its texts.

        Values are strings and integers, which every tool keeps.
        """
        left, right = (text_hash(self.pick.responses[n]) for n in self.order)
        return {
            "pick_id": self.pick.id,
            "pick_pair": json.dumps(list(self.pick.pair)),
            "left_sha256": left,
            "right_sha256": right,
            "seed": "none" if self.seed is None else self.seed,
        }


def show_picks(placed: Sequence[tuple[str, Pick]], seed: int | None) -> list[ShownPick]:
    """Return the picks with their sides: shuffled by `seed`, or as they are if it is None.

    A pick's sides depend on the seed and on the pick alone, not on the other picks. Tools get the
    texts of messages, the calls of tools as lines, and images by name alone, which is logged.

    Raises:
        ActiveDPOError: a text has a NUL or half of a surrogate pair, which tools cannot keep.
    """
    shown = []
    for place, pick in placed:
        order = (0, 1)
        if seed is not None:
            digest = hashlib.sha256(f"{seed}:{pick_key(pick)}".encode()).digest()
            order = (1, 0) if digest[0] & 1 else (0, 1)
        one = ShownPick(pick, order, seed)
        texts = {"the id": pick.id, "the prompt": one.prompt, "a response": one.left + one.right}
        for what, text in texts.items():
            check_string(text, what, place)
            if "\0" in text:
                raise ActiveDPOError(
                    f"{place}: {what} has a NUL character, which annotation tools cannot keep: "
                    "remove it from the pool"
                )
        shown.append(one)
    count = sum(bool(images_of(pick.prompt)) for _, pick in placed)
    if count:
        logger.warning(
            "%d of %d picks have images, which annotation tools are given by name alone; "
            "`activedpo label` shows them",
            count,
            len(placed),
        )
    return shown


def pick_key(pick: Pick) -> str:
    """Return 64 bits of a hash of a pick's id, pair and texts, as 16 hexadecimal digits."""
    return _digest([pick.id, pick.pair, pick.prompt, pick.responses])


def text_hash(text: Text) -> str:
    """Return 64 bits of a hash of a prompt or a response, as 16 hexadecimal digits."""
    return _digest(text)


def split_record_id(record_id: str) -> tuple[str, int] | None:
    """Return (key of the pick, position of the left response); None for any other id."""
    found = _RECORD_ID.fullmatch(record_id)
    return None if found is None else (found[1], int(found[2][0]))


def as_shown(text: Text) -> str:
    """Return a text as one string: itself, or the chat messages one below the other."""
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in text)


def json_text(value: object, indent: int | None = None) -> str:
    """Return JSON for files: readable, without characters that break lines or terminals."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _NOT_PLAIN.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def _digest(value: object) -> str:
    # ASCII: a text with half of a surrogate pair has no UTF-8, and is refused by name elsewhere.
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
